// The Model tab's downloads from the Hub: what a repository offers, what of it is taken, and how that goes.
import { api, attempt, bytes, el, percent, t, whileSeen } from './core.js';
import { chosen } from './models.js';

const PART = /-\d{5}-of-(\d{5})\.gguf$/i;
const LARGE = 2 ** 24;  // smaller files are no weights
const ENDED = ['done', 'failed', 'cancelled'];

export const downloads = {
  told: [], turn: 0,

  mount(host) {
    if (!this.el) this.build();
    host.replaceChildren(this.el);
  },

  build() {
    this.text = el('input.tgw-field', { type: 'text', required: true, maxLength: 2000, autocomplete: 'off', spellcheck: false, placeholder: t('user/model, or a link') });
    this.branch = el('input.tgw-field', { type: 'text', maxLength: 200, autocomplete: 'off', spellcheck: false, placeholder: 'main' });
    this.ask = el('button.tgw-plain-button', { type: 'submit', textContent: t('Show files') });
    this.plan = el('div.tgw-plan');
    this.list = el('ul.tgw-jobs', { 'aria-label': t('Downloads') });
    const form = el('form.tgw-fetch', { onsubmit: (e) => { e.preventDefault(); this.look(); } },
      el('label', {}, el('span', { textContent: t('Repository on the Hub') }), this.text), el('label.tgw-short', {}, el('span', { textContent: t('Branch') }), this.branch), this.ask);
    this.el = el('div', {}, el('p.tgw-aside', { textContent: t('From Hugging Face. The server asks it only when you press a button here.') }), form, this.plan, this.list);
    this.watch = whileSeen(this.el, 1000, () => this.read());
  },

  /** What the repository offers. */
  async look() {
    this.ask.disabled = true;
    this.plan.replaceChildren(el('p.tgw-aside', { role: 'status', textContent: t('Asking the Hub…') }));
    const body = { text: this.text.value.trim(), branch: this.branch.value.trim() };
    const [plan, memory] = await Promise.all([api('POST', 'downloads/plan', body).catch((error) => error), api('GET', 'models/memory').catch(() => null)]);
    this.ask.disabled = false;
    if (plan instanceof Error) return this.plan.replaceChildren(el('pre.tgw-wrong', { role: 'alert', textContent: plan.message }));
    const free = memory?.devices.reduce((sum, device) => sum + device.free, 0) || 0;
    this.offer(plan, body, free);
  },

  offer(plan, body, free) {
    const rows = grouped(plan.files).map((file) => this.row(file, plan, free));
    const replace = el('input', { type: 'checkbox' });
    const go = el('button.tgw-plain-button.primary', { type: 'button', onclick: () => this.start({ ...body, replace: replace.checked }, rows) });
    const total = el('span.tgw-aside');
    const count = () => {
      const wanted = rows.filter(({ box }) => box.checked);
      const size = wanted.reduce((sum, { file }) => sum + file.size, 0);
      go.textContent = t('Download {size}', { size: bytes(size) });
      go.disabled = !wanted.length;
      total.textContent = plan.kind === 'gguf' || !size ? '' : fit(size, free);
    };
    for (const { box } of rows) box.onchange = count;
    count();
    const heads = ['', t('File'), t('Format'), t('Size'), t('In memory')].map((text) => el('th', { scope: 'col', textContent: text, ...(text ? {} : { 'aria-hidden': 'true' }) }));
    this.plan.replaceChildren(
      el('p', {}, el('strong', { textContent: plan.repo }), ` · ${plan.branch}`),
      ...(plan.note ? [el('p.tgw-aside', { textContent: plan.note })] : []),
      el('div.tgw-files', { tabIndex: 0, role: 'region', 'aria-label': t('Files') }, el('table', {}, el('thead', {}, el('tr', {}, ...heads)), el('tbody', {}, ...rows.map((row) => row.el)))),
      el('div.tgw-quick', {}, go, el('label.tgw-tick', {}, replace, el('span', { textContent: t('Replace files of the same name') })), total),
    );
  },

  row(file, plan, free) {
    const box = el('input', { type: 'checkbox', checked: file.chosen, 'aria-label': file.name });
    const weighs = plan.kind === 'gguf' && file.size >= LARGE;
    const bar = el('meter', { max: 1, value: free ? Math.min(1, file.size / free) : 0, low: 0.85, high: 0.99, optimum: 0, 'aria-hidden': 'true' });
    const room = el('td', {}, ...(weighs && free ? [el('span', { textContent: fit(file.size, free) }), bar] : []));
    const line = el('tr', {}, el('td', {}, box), el('td', { textContent: file.name }), el('td', { textContent: file.quant }), el('td', { textContent: bytes(file.size) }), room);
    line.onclick = (e) => { if (e.target !== box) box.click(); };
    return { file, box, el: line };
  },

  async start(body, rows) {
    const files = rows.filter(({ box }) => box.checked).flatMap(({ file }) => file.names);
    if (!await this.answered(() => attempt(() => api('POST', 'downloads', { ...body, files })))) return;
    this.plan.replaceChildren();
    this.watch();
  },

  // --- how they go -------------------------------------------------------------------------------------------------------------------

  /** Whether to ask again. */
  async read() {
    await this.answered(() => api('GET', 'downloads').catch(() => null));  // without a connection the banner says so
    return this.told.some(({ state }) => !ENDED.includes(state) && state !== 'paused');
  },

  show(told) {
    const before = new Map(this.told.map((each) => [each.id, each.state]));
    this.told = told;
    if (told.some(({ id, state }) => state === 'done' && before.has(id) && before.get(id) !== 'done')) this.arrived();
    const shown = [...this.list.children];
    const known = new Map(shown.map((line) => [line.dataset.id, line]));
    const lines = told.map((each) => this.line(each, known.get(each.id)));
    if (lines.length !== shown.length || lines.some((line, n) => line !== shown[n])) this.list.replaceChildren(...lines);  // a button that is put in anew in the middle of a click is not clicked
  },

  /** A model is there that was not. */
  async arrived() {
    await chosen.refresh();
    chosen.repaint();
  },

  line(each, former) {
    const line = former?.dataset.state === each.state ? former : this.made(each);
    const share = each.total ? each.done / each.total : 0;
    line.querySelector('progress').value = share;
    line.querySelector('small').textContent = words(each, share);
    return line;
  },

  made({ id, repo, targets, state, error }) {
    const what = targets.length === 1 ? targets[0] : `${targets[0]} +${targets.length - 1}`;
    const does = (label, action, method = 'POST') => el('button.tgw-plain-button', {
      type: 'button', textContent: label, 'aria-label': `${label}: ${what}`, onclick: () => this.change(method, action ? `downloads/${id}/${action}` : `downloads/${id}`),
    });
    const buttons = {
      queued: [does(t('Pause'), 'pause'), does(t('Cancel'), 'cancel')],
      running: [does(t('Pause'), 'pause'), does(t('Cancel'), 'cancel')],
      paused: [does(t('Resume'), 'resume'), does(t('Cancel'), 'cancel')],
      failed: [does(t('Try again'), 'resume'), does(t('Cancel'), 'cancel')],
    }[state] || [does(t('Take off the list'), '', 'DELETE')];
    return el('li', { 'data-id': id, 'data-state': state }, el('div', {}, el('strong', { textContent: what }), el('span.tgw-aside', { textContent: repo }), el('small')),
      el('progress', { max: 1, 'aria-label': what, hidden: ENDED.includes(state) && state !== 'failed' }), ...(error ? [el('pre.tgw-wrong', { textContent: error })] : []), el('div.tgw-quick', {}, ...buttons));
  },

  async change(method, path) {
    if (await this.answered(() => attempt(() => api(method, path)))) this.watch();
  },

  /** Ask, and show what is told unless something was asked after it: answers may overtake each other. Answers whether there was one. */
  async answered(ask) {
    const turn = ++this.turn;
    const told = await ask();
    if (told && turn === this.turn) this.show(told.downloads);
    return Boolean(told);
  },
};

/** Parts of a split file as one. `names`: what is asked for. */
function grouped(files) {
  const found = new Map();
  for (const file of files) {
    const key = file.name.replace(PART, '-…-of-$1.gguf');
    const former = found.get(key);
    if (former) Object.assign(former, { size: former.size + file.size, chosen: former.chosen || file.chosen, names: [...former.names, file.name] });
    else found.set(key, { ...file, name: key, names: [file.name] });
  }
  return [...found.values()];
}

/** Whether weights of that size find room in what is free; their context needs some too. */
function fit(size, free) {
  return size > free ? t('too large') : size > 0.85 * free ? t('just fits') : t('fits');
}

function words({ state, done, total, speed, left }, share) {
  const so = t('{done} of {total} ({percent})', { done: bytes(done), total: bytes(total), percent: percent(share) });
  const told = {
    queued: t('Waits for its turn'), running: so, paused: `${t('Paused')} · ${so}`, failed: t('Failed'), cancelled: t('Cancelled'), done: t('Done, {size}', { size: bytes(total) }),
  }[state];
  const fast = state === 'running' && speed ? ` · ${t('{speed} a second', { speed: bytes(speed) })}` : '';
  return told + fast + (state === 'running' && left !== null ? ` · ${t('{time} left', { time: time(left) })}` : '');
}

function time(seconds) {
  if (seconds < 90) return t('{count} s', { count: Math.ceil(seconds) });
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? t('{count} min', { count: minutes }) : t('{hours} h {minutes} min', { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
}
