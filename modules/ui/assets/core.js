// What every part of the page uses: elements, requests, messages to the person, the place that holds it all.

export const ROOT = new URL('.', document.baseURI);
export const TITLE = document.title || 'Text Generation Web UI';
export const PHONE = matchMedia('(max-width: 760px)');
export const TOUCH = matchMedia('(hover: none) and (pointer: coarse)');

const formats = new Map();

/** Numbers as the page's language writes them. */
export const number = {
  format(value, digits) {
    const key = `${document.documentElement.lang || 'en'} ${digits}`;
    if (!formats.has(key)) formats.set(key, new Intl.NumberFormat(key.split(' ')[0], { minimumFractionDigits: digits, maximumFractionDigits: digits }));
    return formats.get(key).format(value);
  },
};

export const ICONS = {
  plus: 'M12 5v14M5 12h14', search: 'M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14M20 20l-4-4', side: 'M4 5h16v14H4zM9.5 5v14',
  pen: 'M4 20h4L19 9l-4-4L4 16zM13 7l4 4', bin: 'M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13', yes: 'M5 13l4 4L19 7', no: 'M6 6l12 12M18 6L6 18',
  copy: 'M9 9h11v11H9zM5 15H4V4h11v1', redo: 'M20 11a8 8 0 1 0-2.3 5.7M20 5v6h-6', on: 'M5 12h13M13 6l6 6-6 6', left: 'M14 6l-6 6 6 6',
  right: 'M10 6l6 6-6 6', send: 'M12 19V5M6 11l6-6 6 6', stop: 'M7 7h10v10H7z', down: 'M12 5v14M6 13l6 6 6-6', chat: 'M5 5h14v11H11l-5 4v-4H5z',
  sun: 'M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6L19 19M19 5l-1.4 1.4M6.4 17.6L5 19',
  moon: 'M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z', warn: 'M12 4l9 16H3zM12 10v4M12 17v.5',
};

// --- texts ---------------------------------------------------------------------------------------------------------------------------

let words = {};

/** `text` in the language of the page. English is the key; {name} in it is replaced by values.name. */
export function t(text, values) {
  const found = words[text] || text;
  return values ? found.replace(/\{(\w+)\}/g, (_, name) => values[name]) : found;
}

/** Read the texts of a language; before anything is built. A language without texts is English. */
export async function speak(language) {
  document.documentElement.lang = 'en';
  if (language === 'en') return;
  const answer = await fetch(new URL(`texts/${language}.json`, import.meta.url)).catch(() => null);
  words = answer?.ok ? await answer.json() : {};
  if (answer?.ok) document.documentElement.lang = language;
}

// --- elements ------------------------------------------------------------------------------------------------------------------------

export function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  path.setAttribute('d', ICONS[name]);
  svg.append(path);
  return svg;
}

/** An element: el('button.primary', {onclick, 'aria-label': …}, child, 'text', …). Properties that the element has are set, the rest are attributes. */
export function el(spec, properties = {}, ...children) {
  const [tag, ...classes] = spec.split('.');
  const made = document.createElement(tag);
  made.className = classes.join(' ');
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value; else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function button(name, label, onclick, spec = 'button.tgw-icon') {
  return el(spec, { type: 'button', title: label, 'aria-label': label, onclick }, icon(name));
}

/** Calls `action` when `target` comes near the visible part of `root`. The answer's again() asks anew: a target that stays near does not report. */
export function near(target, root, rootMargin, action) {
  const observer = new IntersectionObserver(([seen]) => { if (seen.isIntersecting) action(); }, { root, rootMargin });
  observer.observe(target);
  return { again() { observer.unobserve(target); observer.observe(target); } };
}

/** Calls `ask` at once and then again after each `pause`, while `ask` answers true, the page can be seen, and `element` can or is a screen away. The result begins anew. */
export function whileSeen(element, pause, ask) {
  let seen = false, turn;
  const look = async () => {
    const mine = turn = {};  // whoever is called last goes on
    while (seen && !document.hidden && await ask() && turn === mine) {
      await new Promise((done) => setTimeout(done, pause));
      if (turn !== mine) return;
    }
  };
  new IntersectionObserver((told) => { if (seen !== (seen = told.at(-1).isIntersecting)) look(); }, { rootMargin: '100%' }).observe(element);
  document.addEventListener('visibilitychange', look);
  return look;
}

export function later(milliseconds, action) {
  let timer = 0;
  const run = () => { clearTimeout(timer); timer = setTimeout(action, milliseconds); };
  run.cancel = () => clearTimeout(timer);
  return run;
}

export class ServerError extends Error {
  constructor(message, code = '', status = 0) { super(message); this.code = code; this.status = status; }
}

export async function api(method, path, body, signal) {
  const options = { method, signal, credentials: 'same-origin' };
  if (method !== 'GET') {
    options.headers = { 'Content-Type': 'application/json', 'X-TGW': '1' };
    options.body = JSON.stringify(body ?? {});
  }
  let response;
  try {
    response = await fetch(new URL(path, ROOT), options);
  } catch {
    throw new ServerError(t('The server cannot be reached. Nothing is lost: try again when it is back.'), 'Offline');
  }
  if (response.status === 401) {
    location.assign(new URL('login', ROOT));
    return new Promise(() => {});  // the page is going away
  }
  const data = await response.json().catch(() => ({}));
  if (response.ok) return data;
  throw new ServerError(data.error?.message || t('The server answered with status {status}.', { status: response.status }), data.error?.code, response.status);
}

/** localStorage that may be full or forbidden: then nothing is remembered, and nothing fails. */
export const memory = {
  get(key) { try { return localStorage.getItem(key); } catch { return null; } },
  set(key, value) {
    try { if (value) localStorage.setItem(key, value); else localStorage.removeItem(key); return true; } catch { return false; }
  },
  forget(wanted) { try { Object.keys(localStorage).filter((key) => wanted.test(key)).forEach((key) => localStorage.removeItem(key)); } catch { /* nothing is there */ } },
};

export const toasts = el('div.tgw-toasts', { role: 'alert' });  // over the composer
export const floating = el('div.tgw-toasts.tgw-floating', { role: 'alert' });  // where the Chat tab is not shown

/** Tell something for a while. `action` {label, run} adds a button, as for Undo. */
export function toast(message, kind = 'error', action = null) {
  const shown = el(`div.tgw-toast.${kind}`, {}, icon(kind === 'error' ? 'warn' : 'yes'), el('span', { textContent: message }));
  if (action) shown.append(el('button.tgw-button', { type: 'button', textContent: action.label, onclick: () => { shown.remove(); action.run(); } }));
  shown.append(button('no', t('Dismiss'), () => shown.remove()));
  const place = root.offsetParent ? toasts : floating;
  while (place.children.length > 2) place.firstChild.remove();
  place.append(shown);
  setTimeout(() => shown.remove(), kind === 'error' || action ? 12000 : 3000);
}

/** A modal dialog with a heading; Esc, the cross and a click beside it close it. Answers {el, body, close}; focus returns to where it was. */
export function dialog(title, ...content) {
  const before = document.activeElement;
  const body = el('div.tgw-dialog-body', { tabIndex: 0 }, ...content);
  const close = () => shown.close();
  const heading = el('h2', { textContent: title });
  const shown = el('dialog.tgw-dialog', { 'aria-label': title }, el('header', {}, heading, button('no', t('Close'), close)), body);
  shown.addEventListener('click', (e) => { if (e.target === shown) close(); });
  shown.addEventListener('keydown', (e) => e.stopPropagation());  // the page's own keys rest meanwhile
  shown.addEventListener('close', () => { shown.remove(); before?.focus?.({ preventScroll: true }); });
  document.body.append(shown);
  shown.showModal();
  return { el: shown, body, close };
}

/** A menu below `anchor`: items are [label, action, icon name or null]; arrows move, Enter chooses, Esc closes. */
export function menu(anchor, items) {
  const close = () => { shown.remove(); removeEventListener('pointerdown', outside, true); anchor.setAttribute('aria-expanded', 'false'); };
  const outside = (e) => { if (!shown.contains(e.target)) close(); };
  const made = items.filter(Boolean).map(([label, action, name]) => el('button', {
    type: 'button', role: 'menuitem', onclick: () => { close(); anchor.focus(); action(); },
  }, name ? icon(name) : el('i'), el('span', { textContent: label })));
  const shown = el('div.tgw-menu', { role: 'menu' }, ...made);
  shown.onkeydown = (e) => {
    e.stopPropagation();
    const step = { ArrowDown: 1, ArrowUp: -1 }[e.key];
    const at = made.indexOf(document.activeElement);
    if (step) { e.preventDefault(); made.at((at + step) % made.length).focus(); }
    if (e.key === 'Escape' || e.key === 'Tab') { e.preventDefault(); close(); anchor.focus(); }
  };
  document.body.append(shown);
  const at = anchor.getBoundingClientRect();
  shown.style.left = `${Math.max(8, Math.min(at.left, innerWidth - shown.offsetWidth - 8))}px`;
  shown.style.top = `${at.bottom + shown.offsetHeight + 4 > innerHeight ? Math.max(8, at.top - shown.offsetHeight - 4) : at.bottom + 4}px`;
  anchor.setAttribute('aria-haspopup', 'menu');
  anchor.setAttribute('aria-expanded', 'true');
  addEventListener('pointerdown', outside, true);
  made[0]?.focus();
}

/** Run `action`; what the server says against it is shown. Answers undefined then. */
export async function attempt(action) {
  try { return await action(); } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    toast(error.message);
  }
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // no clipboard API on plain http
    const area = el('textarea', { value: text, readOnly: true });
    area.style.cssText = 'position:fixed;opacity:0';
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
}

export async function copyFrom(control, text) {
  await copy(text);
  control.classList.add('copied');
  setTimeout(() => control.classList.remove('copied'), 1400);
}

export function bytes(count) { return count > 1e9 ? `${number.format(count / 2 ** 30, 1)} GiB` : count < 2 ** 20 ? `${Math.ceil(count / 1024)} KiB` : `${Math.round(count / 2 ** 20)} MiB`; }

export function percent(share) { return `${Math.round(100 * share)} %`; }

export function write(element, text) { if (element.textContent !== text) element.textContent = text; }

/** What a control of Gradio is told; what is not named stays. */
export const update = (parts = {}) => ({ __type__: 'update', ...parts });

/**
 * Lets a control of Gradio within `place` show `value` and be seen; undefined: what it shows already. `span` is what controls.py says of it;
 * `paint` a class that is new each time. One that is not drawn is told nothing: it is painted once it is (whenDrawn).
 */
export function shownAs(place, { classes, range }, value, paint) {
  const control = classes.map((name) => `.${CSS.escape(name)}`).join('');
  if (!document.querySelector(`${place} ${control}:is([data-drawn], :not(.tgw-unpainted))`)) return update();
  const seen = { elem_classes: [...classes, paint] };
  if (value === undefined) return update(seen);
  if (range) return update({ ...seen, value, minimum: Math.min(value, range[0]), maximum: Math.max(value, range[1]) });  // it may have been set beyond
  const text = Array.isArray(value) ? value.join('\n') : value;  // a list is one item a line
  return update({ ...seen, value: text });
}

/** Whether no control that has a place waits for what it is told: the last class is `paint` + `count`. */
export function shownLast(paint, count) {
  const waiting = document.querySelectorAll(`.tgw-unpainted, [class*="${paint}"]:not(.${paint}${count})`);
  return count > 0 && ![...waiting].some((control) => control.checkVisibility());
}

/**
 * Calls `repaint(control)` for the controls of Gradio that are drawn and not painted, now and from now on.
 *
 * In the frame after it has drawn the contents of a tab or an accordion Gradio writes into them once more what it drew: what had been typed by then
 * would be lost. An animation without frames (style.css) tells that a control has a place; two frames later it has been written.
 */
export function whenDrawn(repaint) {
  const written = (control) => { control.dataset.drawn = ''; repaint(control); };
  const drawn = (control) => requestAnimationFrame(() => requestAnimationFrame(() => written(control)));
  document.addEventListener('animationstart', ({ animationName, target }) => { if (animationName === 'tgw-drawn') drawn(target); });
  document.querySelectorAll('.tgw-unpainted').forEach(drawn);
}

export function slug(loader) { return loader.toLowerCase().replace(/[^a-z0-9]+/g, '-'); }

/** The Chat tab's contents. */
export const root = el('div.tgw');
