// The files of the Parameters tab: presets, grammars, instruction templates. Gradio's controls call these and show what they answer.
import { api, attempt, t, toast, update } from './core.js';
import { session } from './session.js';

const path = (kind, name) => `chat/${kind}/${encodeURIComponent(name)}`;
const OPTION = { presets: 'preset', templates: 'instruction_template' };  // the parameter that names the one in use

/** A menu with what is there now, and with `value` where that is there; without a value it keeps its own. */
function menu(kind, names, value) {
  const choices = [...(kind === 'templates' ? [[t('The model’s own'), '']] : []), ...names.map((name) => [name, name])];
  return update(value === undefined ? { choices } : { choices, value: names.includes(value) ? value : '' });
}

export const library = {
  read: { name: null, text: '' },  // the template's text as the server told it; what differs from it was edited here

  /** The tab is opened: menus of presets, grammars and templates, and the text and example of the template in use. */
  async open(template, text) {
    const found = await attempt(() => api('GET', 'chat/library'));
    const menus = ['presets', 'grammars', 'templates'].map((kind) => (found ? menu(kind, found[kind]) : update()));
    const edited = this.read.name === (template ?? '') && this.read.text !== text;
    return [...menus, ...(edited ? [update(), update()] : await this.template(template ?? ''))];
  },

  /** Save `body` under a name, and use it from now on; the menu. */
  async save(kind, name, body) {
    const wanted = (name ?? '').trim();
    if (!await attempt(() => api('PUT', path(kind, wanted), body))) return update();
    session.set(OPTION[kind], wanted);
    if (kind === 'templates') this.read = { name: wanted, text: body.text };
    toast(t('Saved.'), 'done');
    return this.menu(kind, wanted);
  },

  /** Delete the file; the menu, and the buttons of `ask`. A shipped one of that name is there again; else none is in use. */
  async remove(kind, name) {
    if (!await attempt(() => api('DELETE', path(kind, name ?? '')))) return [update(), ...this.ask(false)];
    toast(t('Deleted.'), 'done');
    const shown = await this.menu(kind, name);
    if (shown.value === '') session.set(OPTION[kind], '');
    return [shown, ...this.ask(false)];
  },

  /** The buttons Delete, Delete for good, Keep it. */
  ask(asked) { return [!asked, asked, asked].map((visible) => update({ visible })); },

  async menu(kind, value) {
    const found = await attempt(() => api('GET', 'chat/library'));
    return found ? menu(kind, found[kind], value) : update();
  },

  /** Whether a menu's text is a name that is there: menus also take new ones, to save under. */
  async knows(kind, name) {
    const found = name && await attempt(() => api('GET', 'chat/library'));
    return Boolean(found?.[kind].includes(name));
  },

  async preset(name) {
    if (await this.knows('presets', name)) await window.tgw.preset(name);
  },

  /** Use the text of a grammar file. */
  async grammar(name) {
    const found = await this.knows('grammars', name) && await attempt(() => api('GET', path('grammars', name)));
    if (!found) return update();
    session.set('grammar_string', found.text);
    return found.text;
  },

  /** Use a template, or with "" the model's own; its text and what it makes of an example. A menu tells its name again when it is left. */
  async choose(name) {
    const wanted = name ?? '';
    if (wanted === this.read.name || wanted && !await this.knows('templates', wanted)) return [update(), update()];
    session.set('instruction_template', wanted);
    return this.template(wanted);
  },

  async template(name) {
    const found = await attempt(() => api('POST', 'chat/template', { name }));
    if (!found) return [update(), update()];
    this.read = { name, text: found.text };
    return [found.text, this.example(found)];
  },

  /** What an edited text makes of the example. */
  async tried(text) {
    const found = await attempt(() => api('POST', 'chat/template', { text: text ?? '' }));
    return found ? this.example(found) : update();
  },

  example(found) {
    const info = found.example && found.error || t('What the model is sent, with a short conversation');
    return update({ value: found.example || found.error, info });
  },
};
