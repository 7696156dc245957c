// The Model tab's conversions: a GGUF file to a Hugging Face folder, such a folder to a GGUF file, an adapter of PEFT to one for llama.cpp.
import { api, attempt, el, percent, t, whileSeen } from './core.js';
import { adapters } from './adapters.js';
import { chosen } from './models.js';

const key = ({ kind, name }) => `${kind} ${name}`;

export const conversions = {
  sources: [], told: { state: 'none', target: '' },

  mount(host) {
    if (!this.el) this.build();
    host.replaceChildren(this.el);
    this.read();
  },

  build() {
    this.source = el('select.tgw-field', { onchange: () => this.targets() });
    this.numbers = el('select.tgw-field');
    this.base = el('select.tgw-field');
    this.based = el('label', { hidden: true }, el('span', { textContent: t('Model that it was trained on') }), this.base);
    this.go = el('button.tgw-plain-button', { type: 'submit', textContent: t('Convert') });
    this.form = el('form.tgw-fetch', { onsubmit: (e) => { e.preventDefault(); this.start(); } },
      el('label', {}, el('span', { textContent: t('Model or adapter') }), this.source), this.based, el('label.tgw-short', {}, el('span', { textContent: t('Convert to') }), this.numbers), this.go);
    this.now = el('div.tgw-jobs');
    this.hint = el('p.tgw-aside');
    this.el = el('div', {}, this.hint, this.form, this.now);
    this.watch = whileSeen(this.el, 1000, () => this.look());
  },

  /** What there is to convert. */
  async read() {
    if (!this.el?.isConnected) return;
    const told = await api('GET', 'conversions/sources').catch(() => null);  // without a connection the banner says so
    if (!told) return;
    this.sources = told.sources;
    const former = this.source.value;
    this.source.replaceChildren(...this.sources.map((each) => el('option', { value: key(each), textContent: each.kind === 'lora' ? t('Adapter {name}', { name: each.name }) : each.name })));
    if (this.sources.some((each) => key(each) === former)) this.source.value = former;
    this.hint.textContent = this.sources.length ? t('The result stands beside the other models. What it is made from stays as it is.') : t('There is nothing to convert yet.');
    this.form.hidden = !this.sources.length;
    this.targets();
  },

  get wanted() { return this.sources.find((each) => key(each) === this.source.value); },

  targets() {
    const { kind, numbers = [] } = this.wanted || {};
    const names = { 'to-hf': (each) => t('Hugging Face folder, {numbers}', { numbers: each }), 'to-gguf': (each) => t('GGUF file, {numbers}', { numbers: each }), lora: () => t('GGUF adapter') };
    const models = this.sources.filter((each) => each.kind !== 'lora');
    this.based.hidden = kind !== 'lora';
    this.base.replaceChildren(el('option', { value: '', textContent: t('not compared') }), ...models.map((each) => el('option', { value: each.name, textContent: each.name })));
    const former = this.numbers.value;
    this.numbers.replaceChildren(...numbers.map((each) => el('option', { value: each, textContent: names[kind](each) })));
    if (numbers.includes(former)) this.numbers.value = former;
  },

  async start() {
    const { kind, name } = this.wanted;
    const told = await attempt(() => api('POST', 'conversions', { kind, name, numbers: this.numbers.value, base: kind === 'lora' ? this.base.value : '' }));
    if (told) { this.show(told); this.watch(); }
  },

  async look() {
    const told = await api('GET', 'conversions').catch(() => null);
    if (told) this.show(told);
    return this.told.state === 'running';
  },

  show(told) {
    const changed = this.told.state !== told.state || this.told.target !== told.target;
    const ended = this.told.state === 'running' && told.state === 'done';
    this.told = told;
    this.go.disabled = told.state === 'running';
    if (changed) this.paint(told);
    if (told.state === 'running') {
      this.bar.value = told.progress;
      this.said.textContent = `${percent(told.progress)} · ${told.text}`;
    }
    if (ended) this.arrived();
  },

  paint({ state, target, text, progress, warnings = [] }) {
    const running = state === 'running';
    this.now.setAttribute('aria-live', running ? 'off' : 'polite');  // the end is read out, each step is not
    this.said = el('small', { textContent: text });
    this.bar = el('progress', { max: 1, value: progress, 'aria-label': target });
    const stop = el('button.tgw-plain-button', { type: 'button', textContent: t('Cancel'), 'aria-label': t('Cancel the conversion'), onclick: () => attempt(() => api('POST', 'conversions/cancel')) });
    this.now.replaceChildren(el('strong', { textContent: target }), state === 'failed' ? el('pre.tgw-wrong', { textContent: text }) : this.said,
      ...warnings.map((words) => el('p.tgw-aside', { textContent: words })), ...(running ? [this.bar, el('div.tgw-quick', {}, stop)] : []));
  },

  async arrived() {
    await chosen.refresh();
    chosen.repaint();
    adapters.read();
  },
};
