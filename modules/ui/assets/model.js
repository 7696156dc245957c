// The model: its card, its name in the header.
import { number, el, api, bytes, write, slug } from './core.js';
import { chat } from './chat.js';
import { live } from './composer.js';

const sheet = new CSSStyleSheet();  // rules instead of classes, because Gradio draws a tab when it is first opened
document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];

export const model = {
  status: { state: 'none', progress: 0, text: '' }, chosen: {}, loader: '', filtered: false, engine: null,

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
    while (this.seen && !document.hidden && this.status.state === 'ready') {
      const told = await api('GET', 'models/status').catch(() => null);  // without a connection the banner says so
      if (turn !== this.turn) return;
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
    this.status = status;
    const name = status.name?.split('/').at(-1).replace(/\.gguf$/i, '') || '';
    const percent = `${Math.round((status.progress || 0) * 100)} %`;
    const words = { none: 'No model', loading: `Loading ${name} ${percent}`, ready: name, failed: 'Model failed to load' }[status.state];
    this.chip.dataset.state = status.state;
    this.chip.lastChild.textContent = words;
    this.chip.title = status.text || words;
    this.tell(status, percent);
    this.paint();
    this.rules();
    this.watch();
  },

  /** Under the composer and in the empty conversation: what is missing before one can talk. */
  tell(status, percent) {
    const choose = openTab.exists('model') ? el('button', { type: 'button', textContent: 'Choose one on the Model tab', onclick: () => openTab('model') }) : null;
    const text = { none: 'No model is loaded. ', failed: 'The model could not be loaded. ', loading: `Loading the model… ${percent}` }[status.state];
    live.model.replaceChildren(...(text ? [el('i', { 'data-state': status.state }), text, ...(choose && status.state !== 'loading' ? [choose] : [])] : []));
    const hint = status.state === 'ready' ? 'Your messages stay on this machine. Enter sends, Shift+Enter begins a new line.' : text;
    chat.welcome.querySelector('p').textContent = hint || '';
  },

  paint() {
    if (!this.host) return;
    const s = this.status;
    const heading = { none: 'No model is loaded', loading: 'Loading', ready: 'Ready', failed: 'Could not load the model' }[s.state];
    const told = el('div', { 'aria-live': 'polite' }, el('header', {}, el('i'), el('strong', { textContent: heading }), el('span', { textContent: s.name || '' })));
    if (s.state === 'loading') told.append(el('progress', { max: 1, value: s.progress, 'aria-label': 'Loading' }));
    if (s.text) told.append(el(s.state === 'failed' ? 'pre' : 'p', { textContent: s.text }));
    this.facts = el('dl');
    this.cache = el('div.tgw-cache', {}, el('span', { textContent: 'Cache in use' }), el('span'), el('meter', { 'aria-label': 'Cache in use' }));
    this.figures();
    this.host.replaceChildren(el('section.tgw-card', { 'data-state': s.state }, told, this.facts, this.cache));
  },

  /** The numbers below. Changing ones are not read out, and only what has changed is touched, so that text stays selected. */
  figures() {
    const s = this.status, e = this.engine;
    const facts = [
      s.loader && ['Loader', s.loader], s.context_length && ['Context', `${number.format(s.context_length)} tokens`],
      s.memory && ['Memory', bytes(s.memory)],
      e && ['Replies under way', `${e.busy} of ${e.parallel}`], e && ['Waiting', number.format(e.waiting)],
      e && ['Chats kept', number.format(e.kept) + (e.spilled ? ` + ${number.format(e.spilled)} in main memory (${bytes(e.spilled_bytes)})` : '')],
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
    write(words, `${number.format(e.cells_used)} of ${number.format(e.cells)} tokens`);
    bar.max = e.cells;
    bar.value = e.cells_used;
  },

  /** Which controls are visible: parameters that the loader honours (if asked), and the options of the chosen loader. */
  rules() {
    const names = this.filtered && this.status.samplers || [];
    const honoured = names.map((name) => `:not(.knob-${CSS.escape(name)})`).join('');
    const css = [honoured && `.tgw-sampler${honoured} { display: none !important }`];
    if (this.loader) css.push(`.tgw-loader:not(.loader-${CSS.escape(slug(this.loader))}) { display: none !important }`);
    css.push(this.status.state === 'loading' ? '.tgw-when-idle { display: none !important }' : '.tgw-when-loading { display: none !important }');
    if (this.status.state !== 'ready') css.push('.tgw-when-ready { opacity: .5; pointer-events: none }');
    sheet.replaceSync(css.filter(Boolean).join('\n'));
  },
};

export function openTab(id) { document.querySelector(`[role=tab][data-tab-id="${id}"]`)?.click(); }
openTab.exists = (id) => Boolean(document.querySelector(`[role=tab][data-tab-id="${id}"]`));
