// The page's script: the chat pane, the model's card, the theme. Gradio mounts empty hosts (see host() in controls.py); everything inside them is made here.
//
// No work per streamed update depends on the number of messages: a block is found by its index, and the browser lays out one message.
// Text goes in with textContent; innerHTML takes only blocks that the server has sanitised.
import { TITLE, PHONE, ServerError, el, api, memory, toasts, floating, toast, attempt, root, speak, t, whenDrawn } from './core.js';
import { session } from './session.js';
import { chat } from './chat.js';
import { sidebar } from './sidebar.js';
import { composer, live } from './composer.js';
import { head } from './head.js';
import { alerts } from './alerts.js';
import { press } from './commands.js';
import { model } from './model.js';
import { chosen } from './models.js';
import { adapters } from './adapters.js';
import { downloads } from './downloads.js';
import { conversions } from './conversions.js';
import { library } from './library.js';
import { panel, sure } from './panel.js';
import { link } from './link.js';
import { theme } from './theme.js';

function build() {
  const [scroller, announce] = chat.build();
  root.append(...sidebar.build(), el('section.tgw-main', { 'aria-label': t('Conversation') }, head.build(), scroller, announce,
    el('div.tgw-dock', {}, chat.jump, link.build(), toasts, composer.build(), live.build())));
  chat.jump.hidden = true;
  alerts.build();
  root.classList.toggle('closed', PHONE.matches || memory.get('tgw.side') === 'closed');
  PHONE.addEventListener('change', () => root.classList.toggle('closed', PHONE.matches || memory.get('tgw.side') === 'closed'));
  document.addEventListener('keydown', press);
  window.visualViewport?.addEventListener('resize', overKeyboard);
  addEventListener('hashchange', () => { if (shownInAddress() !== chat.id) chat.open(shownInAddress()); });
}

/** A keyboard on the screen covers the page's end; what is typed stays above it. */
function overKeyboard() {
  const { height, scale, offsetTop } = window.visualViewport;
  const covered = scale > 1.01 ? 0 : Math.max(0, Math.round(innerHeight - height - offsetTop));
  root.style.setProperty('--tgw-covered', `${covered}px`);
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

/** Begin a new conversation; an `incognito` one is never saved. */
export function startNew({ incognito = false } = {}) {
  if (chat.id || Boolean(chat.incognito) !== incognito) {
    chat.startIncognito = incognito;
    setConversation(null);
  }
  if (PHONE.matches) sidebar.toggle(false);
  composer.box.focus();
}

/** Show or hide the settings beside the conversation; with the name of one of them, go to it. */
export async function showPanel(option) {
  panel.toggle(option ? true : undefined);
  if (!option) return;
  await new Promise((shown) => requestAnimationFrame(shown));
  document.querySelector(`.knob-${option} :is(input, textarea)`)?.focus();
}

/** Load a model, with what was chosen for it on the Model tab. When memory is short the person decides. */
export async function loadModel(name, force = false) {
  if (!name) return toast(t('Choose a model first.'));
  try {
    return await api('POST', 'models/load', { name, ...chosen.asked(name), force });
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    if (error.code !== 'DoesNotFit') return toast(error.message);
    if (await sure(t('Load it all the same?'), error.message, t('Load'))) return loadModel(name, true);
  }
}

/** The language is needed before anything is built, so this browser keeps it. */
function rememberLanguage(language) { if (language) memory.set('tgw.language', language); }

async function language() {
  const known = memory.get('tgw.language') || (await api('GET', 'chat/session').catch(() => ({}))).values?.language;
  const wanted = !known || known === 'auto' ? navigator.language.slice(0, 2) : known;
  return ['en', 'ru'].includes(wanted) ? wanted : 'en';
}

await speak(await language());
document.body.append(floating);
build();
model.build();
theme.build();

/** What Gradio's controls and hosts call, from now on: everything is built. */
window.tgw = {
  library,
  set(name, value) { if (name === 'language') rememberLanguage(value); session.set(name, value); },
  controls() { session.ready(); if (panel.shown) panel.read(); },
  /** Whether the controls show what is in effect. */
  painted: () => session.painted,
  setMany(values) { Object.assign(session.pending, values); session.flush(); },
  save: () => session.save(),
  filter(on) { model.filtered = on; model.rules(); },
  option: (loader, name, value) => chosen.set(loader, name, value),
  async models() { return (await attempt(() => api('GET', 'models')))?.models || []; },
  cancelLoad: () => attempt(() => api('POST', 'models/cancel')),
  /** Set the parameters from a preset. */
  async preset(name) {
    const id = chat.id;
    await session.flush();
    const found = name && await attempt(() => api('POST', 'chat/preset', { name, conversation: id }));
    if (found && id === chat.id) session.adopt(id, found.revision, found.values);
  },
  /** Ask the server for anything; what it says against it is shown, and null answered. */
  async call(method, path, body) { return (await attempt(() => api(method, path, body))) ?? null; },
  panel: () => showPanel(),
  /** Fill a host that Gradio has mounted; again after it mounted anew. */
  mount(kind, host) {
    if (kind === 'header') {
      theme.setting = host.querySelector('[data-theme]')?.dataset.theme || 'auto';
      theme.apply();
      host.replaceChildren(el('div.tgw-brand', { textContent: TITLE }), model.chip, theme.control);
    }
    if (kind === 'chat') { host.replaceChildren(root); model.show(model.status); composer.focus(); }
    if (kind === 'status') model.card(host);
    const part = { card: chosen.card, memory: chosen.memory, adapters, downloads, conversions }[kind];
    part?.mount(host);
  },
};

document.body.classList.add('tgw-built');
model.show(model.status);
if (window.tgwControls) window.tgw.controls();
for (const [kind, host] of window.tgwHosts || []) window.tgw.mount(kind, host);
whenDrawn((control) => (control.closest('.tgw-loader') ? chosen : session).repaintSoon());
sidebar.load();
chat.open(shownInAddress()).then(() => rememberLanguage(session.values.language));
link.connect();
