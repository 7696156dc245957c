// The settings of the conversation shown, beside it. The controls are Gradio's (chat_tab.py); here they are shown and hidden, and know their files.
import { el, api, attempt, dialog, memory, root, shownAs, t, toast, update } from './core.js';
import { chat } from './chat.js';
import { session } from './session.js';

const NARROW = matchMedia('(max-width: 1100px)');  // the panel lies over the conversation then
const ROOMY = matchMedia('(min-width: 1400px)');

export const panel = {
  /** Beside it in the page: the shade behind a panel that lies over the conversation. */
  build() {
    this.show(!NARROW.matches && (memory.get('tgw.panel') || (ROOMY.matches ? 'open' : 'closed')) === 'open');
    NARROW.addEventListener('change', () => this.show(false));
    document.addEventListener('keydown', (e) => {
      if (e.key !== 'Escape' || e.defaultPrevented || !NARROW.matches || !this.shown) return;
      e.preventDefault();
      this.toggle(false);
    });
    root.append(el('div.tgw-panel-shade', { onclick: () => this.toggle(false) }));
  },

  get shown() { return document.body.classList.contains('tgw-with-panel'); },

  show(open) {
    document.body.classList.toggle('tgw-with-panel', open);
    if (open) this.read();
    const place = document.getElementById('tgw-panel');
    place?.setAttribute('role', 'region');
    place?.setAttribute('aria-label', t('Settings of this chat'));
  },

  /** What files there are, for its menus. */
  read() { for (const button of document.querySelectorAll('.tgw-lists')) button.click(); },

  toggle(open = !this.shown) {
    if (open === this.shown) return;
    if (!NARROW.matches) memory.set('tgw.panel', open ? 'open' : 'closed');
    if (open) this.from = document.activeElement;
    const within = document.getElementById('tgw-panel')?.contains(document.activeElement);
    this.show(open);
    if (open && NARROW.matches) document.getElementById('tgw-panel-close')?.focus();
    if (!open && (within || NARROW.matches)) this.from?.focus?.({ preventScroll: true });
  },
};

/** What Gradio's controls call, beside window.tgw. */
window.tgwPanel = {
  within,
  show,
  menu: (folder) => people.menu(folder),
  choose: (kind, name) => people.choose(kind, name),
  save: (kind, name) => people.save(kind, name),
  remove: (kind, name) => people.remove(kind, name),
};

/** What a slider shows after `value` was typed: within its range, which reaches farther where the value in effect did. */
function within(name, value, low, high) {
  const field = name in session.values && document.querySelector(`.knob-${CSS.escape(name)} input[type=number]`);
  const [least, most] = field ? [Number(field.min), Number(field.max)] : [low, high];
  return Math.min(most, Math.max(least, value ?? least));
}

/** What the controls show from now on: the values in effect. `spans`: their names, in order, with what span() in controls.py says of them. */
function show(spans) {
  const told = Object.entries(spans).map(([name, span]) => (
    shownAs('[id^=tgw-tab-]:not(#tgw-tab-model)', span, session.changing(name) ? undefined : session.values[name], `tgw-paint-${session.paints}`)));
  session.all = false;
  return told;
}

/** The files of characters and of users. Each function answers what their menu shows from now on. */
export const people = {
  kind(name) {
    return name === 'character'
      ? { folder: 'characters', saveAs: t('Save the character'), ask: t('Delete the character?'), body: ({ name2, context, greeting }) => ({ name: name2, context, greeting }) }
      : { folder: 'users', saveAs: t('Save the user'), ask: t('Delete the user?'), body: ({ name1, user_bio: bio }) => ({ name: name1, bio }) };
  },

  /** With the files of a folder that are there now. */
  async menu(folder, value) {
    const names = (await api('GET', 'chat/library').catch(() => null))?.[folder];
    return update({ ...(names && { choices: names.map((name) => [name, name]) }), ...(value !== undefined && { value }) });
  },

  /** Fill in the fields from a file. */
  async choose(kind, name) {
    const id = chat.id;
    await session.flush();
    const found = name && await attempt(() => api('POST', `chat/${kind}`, { name, conversation: id }));
    if (found && id === chat.id) session.adopt(id, found.revision, found.values);
  },

  /** Write what stands in the fields to a file; its name is asked for. */
  async save(kind, name) {
    await session.flush();
    const { folder, saveAs, body } = this.kind(kind);
    const taken = (await attempt(() => api('GET', 'chat/library')))?.[folder];
    const values = body(session.values);
    const file = taken && await askName(saveAs, name || values.name, taken);
    if (!file || !await attempt(() => api('PUT', `chat/${folder}/${encodeURIComponent(file)}`, values))) return update();
    if (kind === 'character') session.set('character', file);
    toast(t('Saved.'), 'done');
    return this.menu(folder, file);
  },

  async remove(kind, name) {
    const { folder, ask } = this.kind(kind);
    if (!name) { toast(t('Choose one in the menu first.')); return update(); }
    if (!await sure(ask, t('The file of “{name}” will be gone. Conversations keep what they have of it.', { name }))) return update();
    if (!await attempt(() => api('DELETE', `chat/${folder}/${encodeURIComponent(name)}`))) return update();
    if (kind === 'character') session.set('character', '');
    return this.menu(folder, '');
  },
};

/** A dialog; what was answered in it, or null when it was closed. `content(answer)` makes what is in it. */
function asked(title, content) {
  return new Promise((resolve) => {
    const shown = dialog(title);
    const answer = (value) => { resolve(value); shown.close(); };
    shown.el.addEventListener('close', () => resolve(null));
    shown.body.append(content(answer));
    shown.body.querySelector('[data-first]').focus();
  });
}

function askName(title, name, taken) {
  return asked(title, (answer) => {
    const field = el('input', { type: 'text', value: name, 'aria-label': t('Name of the file'), maxLength: 100, required: true, autocomplete: 'off', 'data-first': '' });
    const save = el('button.primary', { type: 'submit' });
    const label = () => { save.textContent = taken.includes(field.value.trim()) ? t('Replace') : t('Save'); };
    field.oninput = label;
    label();
    return el('form.tgw-sheet.tgw-asks', { onsubmit: (e) => { e.preventDefault(); if (field.value.trim()) answer(field.value.trim()); } },
      field, el('div.tgw-ends', {}, el('button', { type: 'button', textContent: t('Cancel'), onclick: () => answer(null) }), save));
  });
}

/** A question with Cancel and `yes`; whether that was chosen. */
export function sure(title, text, yes = t('Delete')) {
  return asked(title, (answer) => el('div.tgw-sheet', {}, el('p', { textContent: text }), el('div.tgw-ends', {},
    el('button', { type: 'button', textContent: t('Cancel'), onclick: () => answer(false), 'data-first': '' }),
    el('button.danger', { type: 'button', textContent: yes, onclick: () => answer(true) }))));
}
