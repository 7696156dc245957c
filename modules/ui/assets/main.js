// The page's script: the chat pane, the model's card, the theme. Gradio mounts empty hosts (see host() in controls.py); everything inside them is made here.
//
// No work per streamed update depends on the number of messages: a block is found by its index, and the browser lays out one message.
// Text goes in with textContent; innerHTML takes only blocks that the server has sanitised.
import { TITLE, PHONE, el, button, api, memory, toasts, floating, toast, attempt, root, speak } from './core.js';
import { session } from './session.js';
import { chat } from './chat.js';
import { sidebar } from './sidebar.js';
import { composer, live } from './composer.js';
import { model } from './model.js';
import { link } from './link.js';
import { theme } from './theme.js';

function build() {
  const [scroller, announce] = chat.build();
  const bar = el('div.tgw-bar', {}, button('side', 'Show conversations', () => sidebar.toggle(true)), chat.heading,
    button('plus', 'New chat', () => startNew()));
  root.append(...sidebar.build(), el('section.tgw-main', { 'aria-label': 'Conversation' }, bar, scroller, announce,
    el('div.tgw-dock', {}, chat.jump, link.build(), toasts, composer.build(), live.build())));
  chat.jump.hidden = true;
  root.classList.toggle('closed', PHONE.matches || memory.get('tgw.side') === 'closed');
  PHONE.addEventListener('change', () => root.classList.toggle('closed', PHONE.matches || memory.get('tgw.side') === 'closed'));
  document.addEventListener('keydown', keys);
  addEventListener('hashchange', () => { if (shownInAddress() !== chat.id) chat.open(shownInAddress()); });
}

function shownInAddress() {
  return /^#c=([\w-]+)$/.exec(location.hash)?.[1] ?? null;
}

export function setConversation(id, replace = false) {
  const hash = id ? `#c=${encodeURIComponent(id)}` : '';
  if (replace || !hash) history[replace ? 'replaceState' : 'pushState'](null, '', location.pathname + location.search + hash);
  else location.hash = hash;
  if (id !== chat.id || !id) chat.open(id);
}

export function startNew() {
  if (chat.id) setConversation(null);
  if (PHONE.matches) sidebar.toggle(false);
  composer.box.focus();
}

/** Keys that work anywhere on the Chat tab. */
function keys(e) {
  if (!root.offsetParent || e.isComposing || e.defaultPrevented) return;
  const reply = chat.last()?.data.role === 'assistant' ? chat.last() : null;
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName) && (document.activeElement !== composer.box || composer.box.value);
  const focus = document.activeElement;
  const elsewhere = focus !== composer.box && (/^(INPUT|TEXTAREA|SELECT)$/.test(focus?.tagName) || focus?.closest('[role=tablist]'));
  if (e.key === 'Escape' && PHONE.matches && !root.classList.contains('closed')) sidebar.toggle(false);
  else if (e.key === 'Escape' && chat.running) { e.preventDefault(); chat.stop(); }
  else if (elsewhere) return;  // an edit form, a search field or the row of tabs has keys of its own
  else if (e.key === 'Enter' && (e.ctrlKey || e.metaKey) && reply) { e.preventDefault(); chat.regenerate(reply); }
  else if (e.key === 'Enter' && e.altKey && reply) { e.preventDefault(); chat.continue(reply); }
  else if ((e.key === 'ArrowLeft' || e.key === 'ArrowRight') && !typing && reply && !e.ctrlKey && !e.altKey && !e.metaKey && !e.shiftKey) turnPage(e, reply);
}

/** Left and right show other versions of the last reply; right at the newest makes a new one. */
function turnPage(e, reply) {
  if (chat.running) return;
  const versions = reply.data.versions || [reply.data.id];
  const next = versions.indexOf(reply.data.id) + (e.key === 'ArrowLeft' ? -1 : 1);
  e.preventDefault();
  if (versions[next]) chat.select(versions[next]); else if (next > 0) chat.regenerate(reply);
}

/** What Gradio's controls and hosts call. */
window.tgw = {
  set: (name, value) => session.set(name, value),
  setMany(values) { Object.assign(session.pending, values); session.flush(); },
  save: () => session.save(),
  filter(on) { model.filtered = on; model.rules(); },
  option(loader, name, value) { (model.chosen[loader] ??= {})[name] = value; },
  loader(name) { model.loader = name; model.rules(); },
  modelNow: () => model.status.name,
  async models() { return (await attempt(() => api('GET', 'models')))?.models || []; },
  loadModel(name, loader) {
    if (!name) return toast('Choose a model first.');
    const options = loader ? model.chosen[loader] : Object.assign({}, ...Object.values(model.chosen));
    return attempt(() => api('POST', 'models/load', { name, loader: loader || '', options: options || {} }));
  },
  unloadModel: () => attempt(() => api('POST', 'models/unload')),
  cancelLoad: () => attempt(() => api('POST', 'models/cancel')),
  /** Fill a host that Gradio has mounted; again after it mounted anew. */
  mount(kind, host) {
    if (kind === 'header') {
      theme.setting = host.querySelector('[data-theme]')?.dataset.theme || 'auto';
      theme.apply();
      host.replaceChildren(el('div.tgw-brand', { textContent: TITLE }), model.chip, theme.control);
    }
    if (kind === 'chat') { host.replaceChildren(root); model.show(model.status); composer.focus(); }
    if (kind === 'status') model.card(host);
  },
};

await speak(['en', 'ru'].find((known) => known === (memory.get('tgw.language') || navigator.language).slice(0, 2)) || 'en');
document.body.append(floating);
build();
model.build();
theme.build();
model.show(model.status);
for (const [kind, host] of window.tgwHosts || []) window.tgw.mount(kind, host);
sidebar.load();
chat.open(shownInAddress());
session.read().catch(() => {});
link.connect();
