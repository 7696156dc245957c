// The prompts of the library: chosen, their places filled in, put into the box.
import { el, icon, api, attempt, dialog, t, toast } from './core.js';
import { composer } from './composer.js';

const FRESH = 30000;  // milliseconds for which the names are not asked again
const PLACE = /\{\{[ \t]{0,8}([\p{L}\p{N}][\p{L}\p{N}_ -]{0,59})(?:=([^{}]*))?\}\}/gu;  // as the server finds them

/** `text` with its places filled from `values`; what is filled in is not read again. */
function filled(text, values) {
  return text.replace(PLACE, (place, name) => values.get(name.trim()) ?? place);
}

export const prompts = {
  /** All names. Asked again when they may have changed; none when the server cannot say. */
  async names() {
    if (!this.asked || Date.now() - this.when > FRESH) {
      this.when = Date.now();
      this.asked = api('GET', 'chat/library').then((found) => found.prompts, () => []);
    }
    return this.asked;
  },

  /** Ask for what the prompt leaves open, and put it where the caret is. */
  async use(name) {
    const found = await attempt(() => api('GET', `chat/prompts/${encodeURIComponent(name)}`));
    if (!found) return;
    if (found.variables.length) this.ask(name, found); else composer.insert(found.text);
  },

  ask(name, { text, variables }) {
    const fields = variables.map((each) => el('textarea', { rows: 1, value: each.default ?? '', name: each.name, dir: 'auto' }));
    const done = () => {
      close();
      composer.insert(filled(text, new Map(fields.map((field) => [field.name, field.value]))));
    };
    const form = el('form.tgw-fill', { onsubmit: (e) => { e.preventDefault(); done(); } },
      ...variables.map((each, n) => el('label', {}, el('span', { textContent: each.name, dir: 'auto' }), fields[n])),
      el('footer', {}, el('button.tgw-button.primary', { type: 'submit', textContent: t('Put into the box') })));
    form.onkeydown = (e) => { if (e.key === 'Enter' && (e.ctrlKey || e.metaKey)) { e.preventDefault(); done(); } };
    const { close } = dialog(name, form);
    fields[0].focus();
    fields[0].select();
  },

  /** A dialog with all of them. */
  async choose() {
    this.asked = null;
    const names = await this.names();
    if (!names.length) { toast(t('There are no prompts yet.')); return; }
    const field = el('input', { type: 'search', placeholder: t('Search prompts'), 'aria-label': t('Search prompts'), autocomplete: 'off' });
    const list = el('div.tgw-choices');
    const draw = () => {
      const words = field.value.trim().toLowerCase();
      const begins = (each) => each.toLowerCase().startsWith(words);
      const found = names.filter((each) => each.toLowerCase().includes(words));
      list.replaceChildren(...found.sort((a, b) => begins(b) - begins(a)).map((each) => el('button', {
        type: 'button', dir: 'auto', onclick: () => { close(); this.use(each); },
      }, icon('doc'), el('span', { textContent: each }))));
    };
    field.oninput = draw;
    field.onkeydown = (e) => { if (e.key === 'Enter') { e.preventDefault(); list.firstChild?.click(); } };
    draw();
    const { close } = dialog(t('Prompts'), field, list);
    field.focus();
  },
};
