// The model: its card, its name in the header.
import { TOUCH, number, el, api, bytes, write, slug, t, toast } from './core.js';
import { chat } from './chat.js';
import { head } from './head.js';
import { composer, live } from './composer.js';
import { chosen } from './models.js';
import { session } from './session.js';

const sheet = new CSSStyleSheet();  // rules instead of classes, because Gradio draws a tab when it is first opened
document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];

export const model = {
  status: { state: 'none', progress: 0, text: '' }, filtered: false, engine: null, loaded: [],

  build() {
    document.addEventListener('visibilitychange', () => this.watch());
    this.chip = el('button.tgw-chip', { type: 'button', onclick: () => openTab('model') }, el('i'), el('span'));
    return this.chip;
  },

  card(host) {
    this.host = host;
    this.paint();
    this.observer?.disconnect();
    this.observer = new IntersectionObserver((seen) => { this.seen = seen.at(-1).isIntersecting; this.watch(); });
    this.observer.observe(host);
  },

  /** Ask what the engine does, now and every two seconds, while the card can be seen. */
  async watch() {
    const turn = this.turn = {};  // whoever is called last goes on
    while (this.seen && !document.hidden && (this.status.state === 'ready' || this.loaded.length)) {
      const told = await api('GET', 'models/status').catch(() => null);  // without a connection the banner says so
      if (turn !== this.turn) return;
      if (told) {
        this.loaded = told.loaded;
        this.others();
      }
      if (told?.status.state === 'ready' && told.status.name === this.status.name) {  // another model tells itself
        this.status.memory = told.status.memory;
        this.engine = told.engine;
        this.figures();
      }
      await new Promise((done) => setTimeout(done, 2000));
      if (turn !== this.turn) return;
    }
  },

  show(status) {
    if (status.state !== 'ready' || status.name !== this.status.name) this.engine = null;
    if (this.status.state === 'loading' && status.state === 'ready' && status.name !== this.status.name) toast(status.text);  // why it is not the one asked for
    this.status = status;
    const name = status.name?.split('/').at(-1).replace(/\.gguf$/i, '') || '';
    const percent = percentage(status);
    const words = { none: t('No model'), loading: t('Loading {name} {percent}', { name, percent }), ready: name, failed: t('Model failed to load') }[status.state];
    this.chip.dataset.state = status.state;
    this.chip.lastChild.textContent = words;
    this.chip.title = status.text || words;
    this.tell();
    composer.modelChanged();
    head.paint();
    this.paint();
    this.rules();
    this.watch();
    chosen.modelChanged();
  },

  /** Under the composer and in the empty conversation: what is missing before one can talk. */
  tell() {
    const { status } = this;
    const percent = percentage(status);
    const choose = openTab.exists('model') ? el('button', { type: 'button', textContent: t('Choose one on the Model tab'), onclick: () => openTab('model') }) : null;
    const text = { none: t('No model is loaded.'), failed: t('The model could not be loaded.'), loading: t('Loading the model… {percent}', { percent }) }[status.state];
    const sent = composer.waiting ? t('Your message is sent when it is ready.') : '';
    live.model.replaceChildren(...(text ? [el('i', { 'data-state': status.state }), sent ? `${text} · ${sent}` : `${text} `, ...(choose && status.state !== 'loading' ? [choose] : [])] : []));
    const keys = TOUCH.matches ? '' : ` ${t('Enter sends, Shift+Enter begins a new line.')}`;
    const hint = status.state === 'ready' ? t('Your messages stay on this machine.') + keys : text;
    chat.welcome.querySelector('p').textContent = hint || '';
  },

  paint() {
    if (!this.host) return;
    const s = this.status;
    const heading = { none: t('No model is loaded'), loading: t('Loading'), ready: t('Ready'), failed: t('Could not load the model') }[s.state];
    const told = el('div', { 'aria-live': 'polite' }, el('header', {}, el('i'), el('strong', { textContent: heading }), el('span', { textContent: s.name || '' })));
    if (s.state === 'loading') told.append(el('progress', { max: 1, value: s.progress, 'aria-label': t('Loading') }));
    if (s.text) told.append(el(s.state === 'failed' ? 'pre' : 'p', { textContent: s.text }));
    this.facts = el('dl');
    this.cache = el('div.tgw-cache', {}, el('span', { textContent: t('Cache in use') }), el('span'), el('meter', { 'aria-label': t('Cache in use') }));
    this.figures();
    this.list = el('ul.tgw-loaded', { 'aria-label': t('Models in memory') });
    this.others();
    this.host.replaceChildren(el('section.tgw-card', { 'data-state': s.state }, told, this.facts, this.cache, this.list));
  },

  /** The models in memory, where there are others than the current one. */
  others() {
    const shown = this.loaded.some((each) => !each.current) ? this.loaded : [];
    const key = JSON.stringify(shown);
    this.list.hidden = !shown.length;
    if (this.list.dataset.shown === key) return;
    this.list.dataset.shown = key;
    this.list.replaceChildren(...shown.map((each) => el('li', {}, el('span', { textContent: each.name }),
      el('small', { textContent: [each.loader, bytes(each.memory), each.users && t('replies: {count}', { count: each.users }), each.current && t('in use by the page')].filter(Boolean).join(' · ') }),
      el('button.tgw-plain-button', { type: 'button', textContent: t('Unload'), 'aria-label': t('Unload {name}', { name: each.name }), onclick: () => chosen.unload(each.name) }))));
  },

  /** The numbers below. Changing ones are not read out, and only what has changed is touched, so that text stays selected. */
  figures() {
    const s = this.status, e = this.engine;
    const facts = [
      s.loader && [t('Loader'), s.loader], s.context_length && [t('Context'), t('{count} tokens', { count: number.format(s.context_length) })],
      s.memory && [t('Memory'), bytes(s.memory)],
      e && [t('Replies under way'), t('{busy} of {all}', { busy: e.busy, all: e.parallel })], e && [t('Waiting'), number.format(e.waiting)],
      e && [t('Chats kept'), kept(e)],
    ].filter(Boolean);
    const shown = [...this.facts.querySelectorAll('dt')].map((name) => name.textContent);
    if (facts.map(([name]) => name).join() !== shown.join()) {
      this.facts.replaceChildren(...facts.map(([name]) => el('div', {}, el('dt', { textContent: name }), el('dd'))));
    }
    facts.forEach(([, value], n) => write(this.facts.children[n].lastChild, value));
    this.facts.hidden = !facts.length;
    this.cache.hidden = !e?.cells;
    if (!e?.cells) return;
    const [, words, bar] = this.cache.children;
    write(words, t('{used} of {all} tokens', { used: number.format(e.cells_used), all: number.format(e.cells) }));
    bar.max = e.cells;
    bar.value = e.cells_used;
  },

  /** Which controls are visible: parameters that the loader honours (if asked), the options of the chosen loader, what the chat's mode uses. */
  rules() {
    const names = this.filtered && this.status.samplers || [];
    const honoured = names.map((name) => `:not(.knob-${CSS.escape(name)})`).join('');
    const css = [honoured && `.tgw-sampler${honoured} { display: none !important }`];
    css.push(`.tgw-loader:not(.loader-${CSS.escape(slug(chosen.loader || '-'))}) { display: none !important }`);
    if (!chosen.name) css.push('.tgw-when-chosen { display: none !important }');
    if (!chosen.found?.own) css.push('.tgw-when-own { display: none !important }');
    css.push(this.status.state === 'loading' ? '.tgw-when-idle { display: none !important }' : '.tgw-when-loading { display: none !important }');
    if (this.status.state !== 'ready') css.push('.tgw-when-ready { display: none !important }');
    css.push(...unused(session.values.mode, this.status.thinking).map((selector) => `${selector} { display: none !important }`));
    sheet.replaceSync(css.filter(Boolean).join('\n'));
  },
};

/** Selectors of the controls that mean nothing in this mode of a chat, or to the template in use, which knows the options `thinking`. */
function unused(mode, thinking = []) {
  const asked = mode === 'chat' ? [] : thinking;
  return [
    ...(mode === 'instruct' ? ['.tgw-people'] : ['.knob-custom_system_message']),
    ...(mode === 'chat-instruct' ? [] : ['.knob-chat_instruct_command']),
    ...['enable_thinking', 'reasoning_effort', 'preserve_thinking'].filter((name) => !asked.includes(name)).map((name) => `.knob-${name}`),
  ];
}

function percentage(status) { return `${Math.round((status.progress || 0) * 100)} %`; }

function kept(engine) {
  const [count, spilled, size] = [number.format(engine.kept), number.format(engine.spilled), bytes(engine.spilled_bytes)];
  return engine.spilled ? t('{count} + {spilled} in main memory ({size})', { count, spilled, size }) : count;
}

export function openTab(id) { document.querySelector(`[role=tab][data-tab-id="${id}"]`)?.click(); }
openTab.exists = (id) => Boolean(document.querySelector(`[role=tab][data-tab-id="${id}"]`));
