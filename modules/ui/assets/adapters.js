// The Model tab's LoRA adapters: which there are, which the model in use works with, and with what scale.
import { api, attempt, el, t, toast } from './core.js';

export const adapters = {
  told: { adapters: [], able: false },

  mount(host) {
    this.host = host;
    this.paint();
    this.read();
  },

  async read() {
    if (!this.host?.isConnected) return;
    const told = await api('GET', 'models/adapters').catch(() => null);  // without a connection the banner says so
    if (told) this.told = told;
    this.paint();
  },

  paint() {
    if (!this.host) return;
    const { adapters: found, able } = this.told;
    if (!found.length || !able) {
      const words = found.length ? t('Load a model first, one that can use LoRA adapters: llama.cpp and Transformers can.') : t('No adapters yet: put a GGUF adapter, or a folder of PEFT, into the folder loras.');
      return this.host.replaceChildren(el('p.tgw-aside', { textContent: words }));
    }
    const rows = found.map((each) => this.row(each));
    const apply = el('button.tgw-plain-button.primary', { type: 'submit', textContent: t('Apply') });
    const form = el('form.tgw-adapters', { onsubmit: (e) => { e.preventDefault(); this.apply(rows); } },
      el('p.tgw-aside', { textContent: t('They work with the model in use from the next reply on. The scale says how strongly: 1 is as trained.') }),
      el('ul', {}, ...rows.map((row) => row.el)), el('div.tgw-quick', {}, apply));
    this.host.replaceChildren(form);
  },

  row({ name, used, scale }) {
    const box = el('input', { type: 'checkbox', checked: used });
    const field = el('input.tgw-field', { type: 'number', step: 'any', value: String(scale), 'aria-label': t('Scale of {name}', { name }), required: true });
    field.oninput = () => { box.checked = true; };
    return { name, box, field, el: el('li', {}, el('label', {}, box, el('span', { textContent: name })), field) };
  },

  async apply(rows) {
    const wanted = Object.fromEntries(rows.filter(({ box }) => box.checked).map(({ name, field }) => [name, Number(field.value)]));
    const told = await attempt(() => api('POST', 'models/adapters', { wanted }));
    if (!told) return;
    this.told = told;
    this.paint();
    const count = Object.keys(wanted).length;
    toast(count ? t('Adapters in use: {count}.', { count }) : t('No adapter is in use.'), 'done');
  },
};
