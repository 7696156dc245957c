// The Model tab: the chosen model, its card, what it needs of memory, its options, and what the buttons do. Gradio's menus and buttons call window.tgwModel.
import { ServerError, api, attempt, bytes, el, later, number, percent, shownAs, shownLast, slug, t, toast, update, whileSeen } from './core.js';
import { adapters } from './adapters.js';
import { conversions } from './conversions.js';
import { model } from './model.js';
import { loadModel } from './main.js';
import { sure } from './panel.js';

const HASH_PAUSE = 1000;

export const chosen = {
  name: null, found: null, names: [], folder: '', templates: [],
  /** The loader chosen by hand; "" is automatic. */
  byHand: '',
  /** Options changed here and not saved. */
  changed: {},

  /** The loader whose options are shown. */
  get loader() { return this.found?.loader || ''; },

  get values() { return { ...this.found?.values, ...this.changed }; },

  /** What is asked for beside the name when a model is loaded. */
  asked(name) { return name === this.name ? { loader: this.byHand, options: this.changed } : {}; },

  /** The tab is opened, or Refresh pressed: the menus of models and of templates. `loader`: what the menu of loaders shows. */
  async open(loader) {
    if (!this.name) this.byHand = loader || '';
    const library = await attempt(() => api('GET', 'chat/library'));
    if (library) this.templates = library.templates;
    await this.refresh();
    adapters.read();
    return [this.menu(), this.templateMenu()];
  },

  /** Ask which models there are. One that is gone is chosen no more; without a choice the model in use is, or the first. */
  async refresh() {
    const told = await attempt(() => api('GET', 'models'));
    if (!told) return;
    [this.names, this.folder] = [told.models, told.folder || ''];
    conversions.read();
    const name = this.names.includes(this.name) ? this.name : [model.status.name, this.names[0]].find((each) => this.names.includes(each)) ?? null;
    if (name !== this.name || !name) await this.choose(name); else await this.read();
  },

  menu() { return update({ choices: this.names.map((name) => [name, name]), value: this.name }); },

  templateMenu() {
    const value = this.found?.saved.instruction_template || '';
    const names = value && !this.templates.includes(value) ? [...this.templates, value] : this.templates;
    return update({ choices: [[t('The model’s own'), ''], ...names.map((name) => [name, name])], value });
  },

  async choose(name) {
    if (name === this.name && this.found) return;
    const first = !this.name;
    [this.name, this.found, this.changed] = [name ?? null, null, {}];
    if (!first) this.byHand = '';
    this.card.paint();
    this.memory.clear();
    await this.read(true);
  },

  /** Ask for the card of the chosen model, and show it. `fresh`: its saved loader is shown too. */
  async read(fresh = false) {
    const name = this.name;
    this.wrong = '';
    if (name) {
      try {
        const query = new URLSearchParams({ name, loader: this.byHand });
        const found = await api('GET', `models/card?${query}`);
        if (name !== this.name) return;  // another one was chosen meanwhile
        this.found = found;
        if (fresh) this.byHand = found.saved.loader || this.byHand;
      } catch (error) {
        if (!(error instanceof ServerError)) throw error;
        if (name === this.name) this.wrong = error.message;
      }
    }
    this.card.paint();
    this.repaint();
    model.rules();
    this.memory.soon();
  },

  /** Let Gradio's controls show this model's values. The button is there once the tab has been drawn. */
  repaint() {
    this.paints += 1;
    document.getElementById('tgw-model-repaint')?.click();
  },
  repaintSoon: later(0, () => { if (chosen.found) chosen.repaint(); }),
  paints: 0,
  painted() { return shownLast('tgw-option-', this.paints); },

  /** What the controls show: of the menus of models, loaders and templates, and of each loader's options. */
  show(spans) {
    const options = Object.entries(spans).flatMap(([loader, of]) => Object.entries(of).map(([name, span]) => (
      shownAs(`.loader-${slug(loader)}`, span, loader === this.loader ? this.values[name] : undefined, `tgw-option-${this.paints}`))));
    return [this.menu(), this.byHand, this.templateMenu(), ...options];
  },

  /** An option was changed, by a person or a button here. */
  set(loader, name, value) {
    if (loader !== this.loader) return;
    this.changed[name] = value;
    this.memory.soon();
  },

  async useLoader(name) {
    if ((name || '') === this.byHand) return;
    [this.byHand, this.changed] = [name || '', {}];
    await this.read();
  },

  async useTemplate(template) {
    if (!this.name || (template || '') === (this.found?.saved.instruction_template || '')) return;
    const done = await attempt(() => api('PUT', 'models/template', { name: this.name, template: template || '' }));
    if (!done) return this.repaint();
    if (this.found) this.found.saved.instruction_template = template || '';
    toast(t('Saved for this model.'), 'done');
  },

  // --- buttons -----------------------------------------------------------------------------------------------------------------------

  load() { loadModel(this.name); },
  reload() { if (model.status.name) loadModel(model.status.name); },
  cancel() { attempt(() => api('POST', 'models/cancel')); },
  unload(name) { return attempt(() => api('POST', 'models/unload', name ? { name } : {})); },

  async save() {
    const body = { name: this.name, loader: this.byHand, options: this.changed };
    if (!this.name || !await attempt(() => api('PUT', 'models/settings', body))) return;
    this.changed = {};
    await this.read();  // before it is told: who goes on in a menu is not painted over
    toast(t('Saved for this model.'), 'done');
  },

  async restore() {
    if (!this.name || !await attempt(() => api('POST', 'models/restore', { name: this.name }))) return;
    [this.changed, this.byHand] = [{}, ''];
    await this.read();
    toast(t('This model has its usual settings again.'), 'done');
  },

  async remove() {
    const name = this.name;
    if (name && model.status.name === name && ['ready', 'loading'].includes(model.status.state)) return toast(t('This model is in memory. Unload it first.'));
    if (!name || !await sure(t('Delete this model?'), t('“{name}” will be gone from the disk ({size}).', { name, size: bytes(this.found?.card?.size || 0) }))) return;
    if (!await attempt(() => api('POST', 'models/delete', { name }))) return;
    toast(t('Deleted.'), 'done');
    await this.refresh();
  },

  /** The model in use is another one, or has gone: what is free has changed, and which adapters can be used. */
  modelChanged() {
    const key = `${model.status.state} ${model.status.name}`;
    if (key === this.heard || model.status.state === 'loading') return;
    this.heard = key;
    this.memory.soon();
    adapters.read();
  },
};

window.tgwModel = chosen;

/** What the chosen model's files say. */
chosen.card = {
  mount(host) {
    this.host = host;
    this.paint();
  },

  paint() {
    if (!this.host) return;
    const { name, found, wrong, folder, names } = chosen;
    if (!name && !folder) return this.host.replaceChildren();  // nothing was asked yet
    if (!name) {
      const words = names.length ? t('Choose a model above.') : t('No model yet: download one below, or put a .gguf file into {folder} and press Refresh.', { folder });
      return this.host.replaceChildren(el('section.tgw-card.tgw-empty', {}, el('p', { textContent: words })));
    }
    const card = found?.card;
    const head = el('header', {}, el('strong', { textContent: card?.family || card?.architecture || t('Model') }), el('span', { textContent: name }));
    const told = el('section.tgw-card', { 'aria-label': t('About {name}', { name }), 'aria-busy': String(!found && !wrong) }, head);
    if (!found && !wrong) told.append(el('p', { textContent: t('Reading the file…') }));
    if (card) told.append(this.facts(card, found));
    if (wrong || found?.error) told.append(el('pre', { textContent: wrong || found.error }));
    told.append(...this.notes(found).map((words) => el('p', { textContent: words })));
    this.host.replaceChildren(told);
  },

  facts(card, found) {
    const size = card.files > 1 ? t('{size} in {count} files', { size: bytes(card.size), count: card.files }) : bytes(card.size);
    const facts = [
      [t('Parameters'), count(card.parameters)],
      [t('Quantisation'), card.quantisation],
      [t('Trained context'), card.context_length && t('{count} tokens', { count: number.format(card.context_length) })],
      [t('Size'), size],
      [t('Layers'), card.layers && number.format(card.layers)],
      [t('Experts'), card.experts && t('{used} of {all}', { used: card.experts_used, all: card.experts })],
      [t('Sees pictures'), card.vision && t('yes')],
      [t('Chat template'), card.has_template ? t('yes') : card.template ? t('none; usual: {name}', { name: card.template }) : t('none')],
      [t('Based on'), card.base_model],
      [t('Licence'), card.licence],
    ].filter(([, value]) => value);
    const list = el('dl', {}, ...facts.map(([name, value]) => el('div', {}, el('dt', { textContent: name }), el('dd', { textContent: value }))));
    if (found.file) list.append(el('div', {}, el('dt', { textContent: 'SHA-256' }), el('dd', {}, this.hash(found.name))));
    return list;
  },

  /** The file's hash, computed when it is asked for: that reads the whole file. */
  hash(name) {
    const place = el('span.tgw-hash', { role: 'status' });
    const start = el('button.tgw-plain-button', { type: 'button', textContent: t('Compute'), 'aria-label': t('Compute the SHA-256 of the file') });
    let asked = false;
    const ask = async () => {
      if (!asked) return false;
      const told = await api('GET', `models/hash?${new URLSearchParams({ name })}`).catch((error) => error);
      if (told instanceof Error) place.textContent = told.message;
      else if (told.sha256) place.replaceChildren(el('code', { textContent: told.sha256 }));
      return !(told instanceof Error) && !told.sha256;
    };
    const look = whileSeen(place, HASH_PAUSE, ask);
    start.onclick = () => { asked = true; place.textContent = t('Reading the file…'); look(); };
    place.append(start);
    return place;
  },

  notes(found) {
    const card = found?.card;
    if (!card) return [];
    return [
      card.embeds && t('This model makes embeddings for the API; it writes no text.'),
      card.kind === 'adapter' && t('This is a LoRA adapter. Put it into the folder loras and use it with its model.'),
      card.kind === 'vision' && t('This is the vision part of a model. Name it under mmproj in the options of its model.'),
      card.remote_code && t('This model comes with program code. It runs only when the server is started with --trust-remote-code: only from whom you trust.'),
      !found.own && t('It belongs to another program, and is read where it is.'),
    ].filter(Boolean);
  },
};

/** What loading the chosen model takes of each memory, against what is free. */
chosen.memory = {
  turn: 0, told: null, error: '',

  mount(host) {
    this.host = host;
    this.ask = later(300, () => this.read());
    this.look = whileSeen(host, 0, () => { if (this.stale) this.ask(); return false; });
    this.paint();
  },

  clear() { [this.told, this.error] = [null, '']; this.turn += 1; this.paint(); },

  /** Something changed that counts. It is asked for when the bar can be seen. */
  soon() {
    this.stale = true;
    this.look?.();
  },

  async read() {
    const { name, byHand: loader, changed: options, found } = chosen;
    this.stale = false;
    if (!found?.card) return this.clear();
    const turn = ++this.turn;
    const told = await api('POST', 'models/estimate', { name, loader, options }).catch((error) => error);
    if (turn !== this.turn) return;
    [this.told, this.error] = told instanceof Error ? [null, told.message] : [told, ''];
    this.paint();
  },

  paint() {
    if (!this.host) return;
    if (!this.told && !this.error) return this.host.replaceChildren(el('div.tgw-edge'));
    const { told, error } = this;
    const box = el('section.tgw-card.tgw-memory', { 'aria-label': t('Memory it would take') });
    if (error) return this.host.replaceChildren(el('section.tgw-card.tgw-memory', {}, el('pre', { textContent: error })));
    const verdict = told.fits ? t('It fits') : t('It does not fit');
    box.append(el('header', { 'aria-live': 'polite' }, el('strong', { textContent: t('Memory it would take') }), el('span.tgw-verdict', { textContent: verdict, 'data-fits': String(told.fits) })));
    box.append(...told.devices.map((device) => this.device(device)), this.legend(told.devices));
    if (told.refusal) box.append(el('p', { textContent: told.refusal }));
    const ends = el('div.tgw-quick');
    if (told.largest_context) ends.append(this.quick('ctx_size', told.largest_context, t('Largest context that fits: {count}', { count: number.format(told.largest_context) })));
    if (told.gpus) ends.append(this.quick('gpu_layers', told.best_gpu_layers, t('Best number of GPU layers: {count}', { count: told.best_gpu_layers })));
    if (ends.children.length) box.append(ends);
    this.host.replaceChildren(box);
  },

  quick(option, value, label) {
    const there = chosen.values[option] === value;
    return el('button.tgw-plain-button', {
      type: 'button', textContent: label, disabled: there, onclick: () => { chosen.set(chosen.loader, option, value); chosen.repaint(); },
    });
  },

  device(device) {
    const name = device.name === 'main memory' ? t('Main memory') : device.name;
    const need = Object.values(device.needs).reduce((sum, size) => sum + size, 0);
    const used = device.total - device.free;
    const whole = Math.max(device.total, used + need);
    const words = t('{need} of {free} free', { need: bytes(need), free: bytes(device.free) });
    const part = (purpose, size) => {
      const made = el('i', { 'data-purpose': purpose });
      made.style.width = `${100 * size / whole}%`;
      return made;
    };
    const label = [t('{share} in use by others', { share: percent(used / device.total) }), ...ordered(device.needs).map(([purpose, size]) => `${purposes()[purpose]} ${bytes(size)}`)].join(', ');
    return el('div.tgw-device', { 'data-short': String(need > device.free) }, el('span', { textContent: name }), el('span', { textContent: words }),
      el('div.tgw-segments', { role: 'img', 'aria-label': `${name}: ${label}` }, part('others', used), ...ordered(device.needs).map(([purpose, size]) => part(purpose, size))));
  },

  legend(devices) {
    const sizes = {};
    for (const { needs } of devices) for (const [purpose, size] of Object.entries(needs)) sizes[purpose] = (sizes[purpose] || 0) + size;
    return el('ul.tgw-legend', {}, el('li', {}, el('i', { 'data-purpose': 'others' }), t('In use by others')),
      ...ordered(sizes).map(([purpose, size]) => el('li', {}, el('i', { 'data-purpose': purpose }), `${purposes()[purpose]} ${bytes(size)}`)));
  },
};

function purposes() {
  return { weights: t('Weights'), cache: t('Cache'), compute: t('Computing'), engine: t('Engine'), vision: t('Vision') };
}

/** Needs in the order of the bar, the largest part of most models first. */
function ordered(needs) { return Object.keys(purposes()).filter((purpose) => needs[purpose]).map((purpose) => [purpose, needs[purpose]]); }

/** A number of parameters as people say it. */
function count(parameters) {
  if (!parameters) return '';
  const large = parameters >= 1e9;
  const value = parameters / (large ? 1e9 : 1e6);
  const shown = value >= 100 ? Math.round(value) : number.format(value, 1);
  return large ? t('{count} billion', { count: shown }) : t('{count} million', { count: shown });
}
