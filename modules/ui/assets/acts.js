// What is done with conversations of the list, one or several.
import { api, attempt, el, menu, toast, t } from './core.js';
import { chat } from './chat.js';
import { setConversation, startNew } from './main.js';
import { confirmed, exportAll, manage, move, tags } from './manage.js';
import { files } from './files.js';
import { filters } from './filters.js';
import { selection } from './selection.js';
import { sidebar } from './sidebar.js';
import { openTrash } from './trash.js';

/** The menu beside New chat. */
export function listMenu(anchor) {
  menu(anchor, [
    [t('New chat'), () => startNew(), 'plus'],
    [t('Incognito chat'), () => startNew({ incognito: true }), 'mask'],
    [t('Select…'), () => selection.begin(), 'select'],
    [t('Folders and tags…'), () => manage(), 'folder'],
    [t('Import…'), () => files.choose(), 'import'],
    [t('Export all…'), () => exportAll(), 'export'],
    [t('Trash…'), () => openTrash(), 'bin'],
  ]);
}

/** The menu of a row. An incognito chat is not arranged: it is gone soon. */
export function rowMenu(row) {
  const { id, pinned, incognito } = row.item;
  menu(row.querySelector('.tgw-tools button'), [
    [t('Rename'), () => rename(row), 'pen'],
    !incognito && [pinned ? t('Unpin') : t('Pin'), () => arrange([id], { pinned: !pinned }), 'pin'],
    !incognito && [t('Move to folder…'), () => move([id]), 'folder'],
    !incognito && [t('Tags…'), () => tags([id]), 'tag'],
    [t('Select'), () => selection.begin(row), 'select'],
    [t('Export as JSON'), () => files.export([id], 'json'), 'export'],
    [t('Export as Markdown'), () => files.export([id], 'markdown'), 'export'],
    [t('Delete'), () => removeChats([id]), 'bin'],
  ]);
}

/** Let another name be typed in the row's place. */
export function rename(row) {
  if (row.classList.contains('busy')) return;
  const field = el('input.tgw-rename', { value: row.item.title, 'aria-label': t('New name'), maxLength: 200 });
  const done = async (save, back) => {
    if (field.onblur === null) return;
    field.onblur = null;
    const [title, { id, title: former }] = [field.value.trim(), row.item];
    row.classList.remove('busy');
    sidebar.fill(row);
    if (!sidebar.query) sidebar.settle(row);
    if (back) row.querySelector('a').focus();
    if (!save || !title || title === former) return;
    if (await attempt(() => api('PATCH', `chat/conversations/${encodeURIComponent(id)}`, { title }))) sidebar.changed({ id, title });
  };
  field.onkeydown = (e) => {
    e.stopPropagation();
    if (e.key === 'Enter' && !e.isComposing) { e.preventDefault(); done(true, true); }
    if (e.key === 'Escape') done(false, true);
  };
  field.onblur = () => done(true, false);
  row.classList.add('busy');
  row.replaceChildren(field);
  field.focus();
  field.select();
}

/** Change folder, pin or tags of several: {folder?, pinned?, add_tags?, remove_tags?}. True if the server did. `asked` tells what it says against it. */
export async function arrange(ids, changes, asked = attempt) {
  if (!(await asked(() => api('POST', 'chat/arrange', { conversations: ids, ...changes })))) return false;
  for (const id of ids) {
    const item = sidebar.items.get(id)?.item;
    if (item) sidebar.changed({ id, ...arranged(item, changes) });
  }
  filters.soon();
  return true;
}

function arranged(item, { folder = item.folder, pinned = item.pinned, add_tags: added = [], remove_tags: removed = [] }) {
  return { folder, pinned, tags: [...new Set([...item.tags.filter((tag) => !removed.includes(tag)), ...added])] };
}

/** Delete several. The toast takes it back; so does the trash. */
export async function removeChats(ids) {
  if (!ids.length || (ids.some((id) => id.startsWith('incognito-')) && !(await forGood()))) return;
  const open = ids.includes(chat.id) ? chat.id : null;
  const title = sidebar.items.get(ids[0])?.item.title.slice(0, 60) ?? '';
  const answer = await attempt(() => api('POST', 'chat/delete', { conversations: ids }));
  if (!answer) { sidebar.load(); return; }  // some of them may be deleted
  ids.forEach((id) => sidebar.gone(id));
  const text = ids.length === 1 ? t('Deleted: {title}', { title }) : t('{count} conversations deleted.', { count: ids.length });
  toast(text, 'done', answer.undo.length ? { label: t('Undo'), run: () => restore(answer.undo, open) } : null);
}

function forGood() {
  return confirmed(t('Delete an incognito chat?'), t('It was never stored and cannot be brought back.'), t('Delete'));
}

/** Bring back what was deleted under these numbers, and show `open` again. The server tells the list, but not what a search finds. Answers the conversations. */
export async function restore(numbers, open = null, asked = attempt) {
  const answer = await asked(() => api('POST', 'chat/undo', { undo: numbers }));
  if (answer && open && answer.conversations.includes(open)) setConversation(open);
  if (sidebar.query) sidebar.load(); else filters.soon();
  return answer?.conversations;
}
