// Dialogs that arrange conversations: into folders, with tags, all at once.
import { TOUCH, ServerError, icon, el, api, button, dialog, menu, toast, t } from './core.js';
import { arrange } from './acts.js';
import { sidebar } from './sidebar.js';
import { filters, hue, listPath } from './filters.js';
import { files } from './files.js';

/** A dialog with a line for what the server says against it: the page's own messages would stand behind. `run(action)` answers undefined then. */
export function sheet(title, ...content) {
  const said = el('p.tgw-said', { role: 'status' });
  const shown = dialog(title, el('div.tgw-sheet', {}, ...content, said));
  shown.tell = (text) => { said.textContent = text; };
  shown.run = async (action) => {
    shown.tell('');
    try { return await action(); } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      shown.tell(error.message);
    }
  };
  return shown;
}

/** A button that acts at its second click; the first one makes it say `sure`. */
export function twice(made, sure, action) {
  const first = [...made.childNodes];
  const rest = () => { made.classList.remove('danger'); made.replaceChildren(...first); };
  made.onblur = rest;
  made.onclick = () => {
    if (made.classList.contains('danger')) { rest(); action(); return; }
    made.classList.add('danger');
    made.replaceChildren(el('span', { textContent: sure() }));
    made.focus();  // Safari does not focus a button that is clicked
  };
  return made;
}

/** Ask before what cannot be taken back. Answers true or false. */
export function confirmed(title, text, label) {
  return new Promise((resolve) => {
    const yes = el('button.danger', { type: 'button', textContent: label, onclick: () => { resolve(true); shown.close(); } });
    const no = el('button', { type: 'button', textContent: t('Cancel'), autofocus: true, onclick: () => shown.close() });
    const shown = sheet(title, el('p', { textContent: text }), el('div.tgw-ends', {}, no, yes));
    shown.el.addEventListener('close', () => resolve(false));
  });
}

/** Choose a folder for conversations, or make one. */
export function move(ids) {
  const now = folderOf(ids);
  const field = el('input', {
    type: 'text', maxLength: 60, autofocus: !TOUCH.matches, autocomplete: 'off', placeholder: t('Find or name a folder'), 'aria-label': t('Folder'),
  });
  const list = el('ul.tgw-lines');
  const take = async (folder) => {
    if (!(await arrange(ids, { folder }, shown.run))) return;
    shown.close();
    back(ids);
    toast(folder ? t('Moved to “{name}”.', { name: folder }) : t('Taken out of its folder.'), 'done');
  };
  const line = (name, label, mark, count) => el('li', {}, el('button', { type: 'button', 'aria-pressed': String(name === now), onclick: () => take(name) },
    icon(mark), el('span', { textContent: label, dir: 'auto' }), count === undefined ? null : el('b', { textContent: count }), name === now ? icon('yes') : null));
  const draw = () => {
    const typed = field.value.trim();
    const known = filters.folders.filter(([name]) => name.toLowerCase().includes(typed.toLowerCase()));
    const lines = known.map(([name, count]) => line(name, name, 'folder', count));
    if (typed && !filters.folders.some(([name]) => name === typed)) lines.push(line(typed, t('New folder “{name}”', { name: typed }), 'plus'));
    if (!typed && now !== '') lines.push(line('', t('No folder'), 'no'));
    list.replaceChildren(...lines);
    if (!lines.length) list.append(el('li.tgw-none', { textContent: t('There is no folder yet. Type the name of the first one.') }));
  };
  field.oninput = draw;
  const enter = () => {
    const typed = field.value.trim();
    const known = filters.folders.find(([name]) => name.toLowerCase() === typed.toLowerCase());
    if (typed) take(known?.[0] ?? typed);
  };
  const form = el('form', { onsubmit: (e) => { e.preventDefault(); enter(); } }, field);
  const shown = sheet(ids.length === 1 ? t('Move to folder') : t('Move {count} conversations', { count: ids.length }), form, list);
  draw();
}

/** The row may have been made anew meanwhile: then the dialog cannot give the focus back. */
function back(ids) { sidebar.items.get(ids[0])?.querySelector('a')?.focus({ preventScroll: true }); }

/** The folder that all have, or undefined. */
function folderOf(ids) {
  const found = new Set(ids.map((id) => sidebar.items.get(id)?.item.folder));
  return found.size === 1 ? [...found][0] : undefined;
}

/** Set the tags of conversations. What only some of them have is left so unless it is clicked. */
export function tags(ids) {
  const had = new Map(filters.tags.map(([name]) => [name, 0]));
  for (const id of ids) for (const name of sidebar.items.get(id)?.item.tags || []) had.set(name, (had.get(name) || 0) + 1);
  const list = el('ul.tgw-lines');
  const add = (name, count) => {
    const box = el('input', { type: 'checkbox', checked: count === ids.length, indeterminate: count > 0 && count < ids.length, value: name });
    const dot = el('i.tgw-dot');
    dot.style.setProperty('--tgw-hue', hue(name));
    list.append(el('li', {}, el('label', {}, box, dot, el('span', { textContent: name, dir: 'auto' }))));
  };
  had.forEach((count, name) => add(name, count));
  const field = el('input', { type: 'text', maxLength: 40, autofocus: !TOUCH.matches, autocomplete: 'off', placeholder: t('New tag'), 'aria-label': t('New tag') });
  const take = () => {
    const name = field.value.trim();
    const known = [...list.querySelectorAll('input')].find((box) => box.value === name);
    if (name && !known) add(name, ids.length);
    if (known) Object.assign(known, { checked: true, indeterminate: false });
    field.value = '';
    return Boolean(name);
  };
  const save = async () => {
    take();
    const boxes = [...list.querySelectorAll('input')].filter((box) => !box.indeterminate);
    const changes = {
      add_tags: boxes.filter((box) => box.checked && had.get(box.value) !== ids.length).map((box) => box.value),
      remove_tags: boxes.filter((box) => !box.checked && had.get(box.value)).map((box) => box.value),
    };
    if (changes.add_tags.length + changes.remove_tags.length && !(await arrange(ids, changes, shown.run))) return;
    shown.close();
    back(ids);
  };
  const form = el('form', { onsubmit: (e) => { e.preventDefault(); if (!take()) save(); } }, field);
  const shown = sheet(ids.length === 1 ? t('Tags') : t('Tags of {count} conversations', { count: ids.length }), form, list,
    el('div.tgw-ends', {}, el('button', { type: 'button', textContent: t('Cancel'), onclick: () => shown.close() }),
      el('button.primary', { type: 'button', textContent: t('Save'), onclick: save })));
}

/** The menu of a folder or a tag above the list. */
export function menuOf(anchor, kind, name) {
  menu(anchor, [
    [kind === 'folder' ? t('Show this folder') : t('Show this tag'), () => filters.choose(kind, name), 'search'],
    [t('Export as JSON'), async () => files.export(await having(kind, name), 'json'), 'export'],
    [t('Folders and tags…'), () => manage(), 'pen'],
  ]);
}

/** All folders and tags: rename them, or take them away from their conversations. */
export function manage() {
  const place = el('div');
  const shown = sheet(t('Folders and tags'), place);
  const draw = async () => {
    await shown.run(() => filters.read());
    const lines = [...filters.folders.map((each) => line('folder', ...each)), ...filters.tags.map((each) => line('tag', ...each))];
    place.replaceChildren(lines.length ? el('ul.tgw-lines', {}, ...lines)
      : el('p.tgw-none', { textContent: t('There is none yet. The menu of a conversation (⋯) puts it into a folder or gives it tags.') }));
  };
  const line = (kind, name, count) => {
    const mark = kind === 'folder' ? icon('folder') : el('i.tgw-dot');
    mark.style.setProperty('--tgw-hue', hue(name));
    const row = el('li.tgw-line', {}, mark, el('span', { textContent: name, dir: 'auto' }), el('b', { textContent: count }),
      button('pen', t('Rename {name}', { name }), () => rename(row, kind, name)),
      twice(button('bin', t('Remove {name}', { name }), null), () => t('Remove? The conversations stay.'), () => change(kind, name, '')));
    return row;
  };
  const rename = (row, kind, name) => {
    const field = el('input', { type: 'text', value: name, maxLength: kind === 'folder' ? 60 : 40, 'aria-label': t('New name') });
    row.replaceChildren(el('form', {
      onsubmit: (e) => { e.preventDefault(); const typed = field.value.trim(); if (typed && typed !== name) change(kind, name, typed); else draw(); },
      onkeydown: (e) => { if (e.key === 'Escape') { e.preventDefault(); draw(); } },
    }, field, el('button.primary', { type: 'submit', textContent: t('Save') })));
    field.focus();
    field.select();
  };
  const change = async (kind, name, to) => {
    const ids = await shown.run(() => having(kind, name));
    const changes = kind === 'folder' ? { folder: to } : { remove_tags: [name], add_tags: to ? [to] : [] };
    if (ids && await arrange(ids, changes, shown.run)) await draw();
  };
  draw();
}

/** The ids of all conversations in a folder or with a tag, wherever the list ends. */
async function having(kind, name) {
  const found = [];
  for (let before = ''; before !== null;) {
    const page = await api('GET', listPath({ [kind]: name, before }));
    found.push(...page.items.map((item) => item.id));
    before = page.next;
  }
  return found;
}

/** Everything as one file. */
export function exportAll() {
  const line = (form, label, text) => el('li', {}, el('button', { type: 'button', onclick: () => { shown.close(); files.export(null, form); } },
    icon('export'), el('span', {}, label, el('small', { textContent: text }))));
  const shown = sheet(t('Export all conversations'), el('ul.tgw-lines', {},
    line('json', 'JSON', t('Everything, with all versions; it can be imported again.')),
    line('markdown', 'Markdown', t('For reading: the branches shown.'))));
}
