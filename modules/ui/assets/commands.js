// Everything that can be done to a conversation, once: from this come the keys, the list behind "/", the menu beside the box and the help sheet.
import { ICONS, PHONE, TOUCH, menu, root, t, toast } from './core.js';
import { chat } from './chat.js';
import { sidebar } from './sidebar.js';
import { composer } from './composer.js';
import { files } from './files.js';
import { head } from './head.js';
import { help } from './help.js';
import { past } from './past.js';
import { prompts } from './prompts.js';
import { showPanel, startNew } from './main.js';

Object.assign(ICONS, {
  bars: 'M5 7h14M5 12h14M5 17h14', clock: 'M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16M12 8v4l3 2', user: 'M12 4a4 4 0 1 0 0 8 4 4 0 0 0 0-8M5 20c1-4 4-5 7-5s6 1 7 5',
  tree: 'M7 8.5v7M7 15.5a2.2 2.2 0 1 0 0 4.4 2.2 2.2 0 0 0 0-4.4M7 4a2.2 2.2 0 1 0 0 4.4A2.2 2.2 0 0 0 7 4M17 4a2.2 2.2 0 1 0 0 4.4A2.2 2.2 0 0 0 17 4M17 8.5c0 5-10 2.5-10 7', panel: 'M4 5h16v14H4zM14.5 5v14',
  doc: 'M6 4h9l4 4v12H6zM9 11h7M9 15h7', several: 'M4 8h11v11H4zM9 8V5h11v11h-5', help: 'M9 9a3 3 0 1 1 4 3c-1 .5-1 1-1 2M12 18v.5', begin: 'M5 5v14M9 12h10M9 7h6M9 17h6',
  swap: 'M4 8h14M14 4l4 4-4 4M20 16H6M10 12l-4 4 4 4',
});

const idle = () => !chat.busy && !composer.writing;
const reply = () => (chat.last()?.data.role === 'assistant' ? chat.last() : null);
const written = () => idle() && reply() && !reply().data.greeting;
const versions = () => reply()?.data.versions || [reply()?.data.id];
const saved = () => Boolean(chat.id);
const insertable = () => idle() && (saved() || !chat.incognito);

let made;

/** All of them, in the order of the help sheet. Each has what it needs of
 *
 *  keys: as 'Ctrl+Enter' (Ctrl is also ⌘); without `run` the browser itself does it
 *  where: 'box' (typing), 'chat' (no other field has the focus), 'anywhere' on the Chat tab
 *  name, also: behind "/"; argument: what may follow the name, needed unless `optional`
 *  menu: it stands in the menu beside the box
 *  when(): whether it can be done now; run(argument)
 *
 *  What has no label is not told. Of several with one key, the first that can be done is done.
 */
export function commands() { made ??= table(); return made; }

function table() {
  return [
    // --- the box
    { keys: 'Enter', where: 'box', label: t('Send, or queue while a reply is being written'), when: () => !TOUCH.matches && !composer.impersonating, run: () => composer.submit() },
    { keys: 'Shift+Enter', where: 'box', label: t('Begin a new line') },
    { keys: 'ArrowUp', where: 'box', label: t('In the empty box: an older message of yours'), when: () => past.has(1, composer.box.value), run: () => composer.walk(1) },
    { keys: 'ArrowDown', where: 'box', label: t('Back to the newer one'), when: () => past.has(-1, composer.box.value), run: () => composer.walk(-1) },
    { keys: 'Ctrl+ArrowUp', where: 'box', label: t('Edit your last message'), when: () => idle() && chat.lastOf('user'), run: () => chat.lastOf('user').edit() },
    // --- replies
    { keys: 'Escape', where: 'anywhere', when: () => PHONE.matches && !root.classList.contains('closed'), run: () => sidebar.toggle(false) },
    { keys: 'Escape', where: 'anywhere', label: t('Stop'), when: () => composer.writing || composer.waiting, run: () => composer.stop() },
    { keys: 'Ctrl+Enter', where: 'chat', name: 'regenerate', menu: true, icon: 'redo', label: t('Regenerate'), when: written, run: () => chat.regenerate(reply()) },
    { keys: 'Alt+Enter', where: 'chat', name: 'continue', menu: true, icon: 'on', label: t('Continue'), when: written, run: () => chat.continue(reply()) },
    { keys: 'Ctrl+Shift+Backspace', where: 'chat', name: 'remove', menu: true, icon: 'bin', label: t('Remove last'), when: () => idle() && chat.last(), run: () => chat.removeLast() },
    { keys: 'Ctrl+Shift+M', where: 'chat', name: 'impersonate', menu: true, icon: 'user', label: t('Impersonate'), when: idle, run: () => composer.impersonate() },
    { keys: 'ArrowLeft', where: 'chat', label: t('Previous version'), when: () => turning(-1), run: () => turn(-1) },
    { keys: 'ArrowRight', where: 'chat', label: t('Next version; a new one at the end'), when: () => turning(1), run: () => turn(1) },
    // --- messages
    { name: 'insert', argument: t('text'), menu: true, icon: 'pen', label: t('Insert user message'), when: insertable, run: (text) => insert('user', text) },
    { name: 'insert-reply', argument: t('text'), menu: true, icon: 'pen', label: t('Insert assistant message'), when: insertable, run: (text) => insert('assistant', text) },
    { name: 'prompt', argument: t('name'), menu: true, icon: 'doc', label: t('Prompts…'), run: () => prompts.choose() },
    { menu: true, icon: 'several', label: t('Several answers…'), when: () => idle() && (typed() || written()), run: severalAnswers },
    { menu: true, icon: 'begin', label: t('Start reply with…'), run: () => showPanel('start_with') },
    // --- conversations
    { keys: 'Ctrl+Shift+O', where: 'anywhere', name: 'new', icon: 'plus', label: t('New chat'), run: () => startNew() },
    { name: 'incognito', icon: 'mask', label: t('New incognito chat: nothing of it is saved'), run: () => startNew({ incognito: true }) },
    { name: 'rename', also: ['title'], argument: t('title'), optional: true, icon: 'pen', label: t('Rename this chat'), when: saved, run: (title) => head.rename(title) },
    { name: 'tree', icon: 'tree', label: t('All branches of this chat'), when: saved, run: () => head.tree() },
    { name: 'export', argument: t('json or markdown'), optional: true, icon: 'export', label: t('Save this chat as a file'), when: saved, run: exported },
    { name: 'model', icon: 'swap', label: t('Change the model'), when: () => head.choosable, run: () => head.choose() },
    { keys: 'Ctrl+K', where: 'anywhere', label: t('Search the chats'), run: () => { sidebar.toggle(true); sidebar.search(); } },
    { keys: 'Ctrl+B', where: 'anywhere', label: t('Show or hide the list'), run: () => sidebar.toggle(root.classList.contains('closed')) },
    { keys: 'Ctrl+S', where: 'anywhere', label: t('Show or hide the settings of this chat'), run: () => showPanel() },
    { keys: 'Ctrl+/', where: 'anywhere', name: 'help', icon: 'help', menu: true, label: t('Keys and commands'), run: () => help() },
  ];
}

/** Of the menu beside the box: those that can be done now. */
export function actions() {
  return commands().filter((each) => each.menu && (!each.when || each.when())).map((each) => [each.label, () => each.run(''), each.icon]);
}

// --- keys --------------------------------------------------------------------------------------------------------------------------------

/** Called for each key that is pressed on the page. */
export function press(e) {
  if (!root.offsetParent || e.isComposing || e.keyCode === 229 || e.defaultPrevented) return;
  const found = commands().find((each) => each.keys && pressed(e, each.keys) && focused(each.where) && (!each.when || each.when()));
  if (!found?.run) return;
  e.preventDefault();
  found.run('');
}

function pressed(e, keys) {
  const wanted = keys.split('+');
  const key = wanted.pop() || '+';
  const symbol = key === '/';  // on some keyboards it needs Shift; on a Russian one a full stop is in its place
  const latin = /^[\x20-\x7e]$/.test(e.key) || e.key.length > 1;  // else another alphabet: then the place of the key counts
  const same = latin ? e.key.toLowerCase() === key.toLowerCase() || (symbol && e.key === '.' && e.code === 'Slash') : e.code === `Key${key}`;
  return same && (e.ctrlKey || e.metaKey) === wanted.includes('Ctrl') && e.altKey === wanted.includes('Alt') && (symbol || e.shiftKey === wanted.includes('Shift'));
}

function focused(where) {
  const focus = document.activeElement;
  if (where === 'anywhere') return true;
  if (where === 'box' || focus === composer.box) return focus === composer.box;
  // An edit form, a search field or the row of tabs has keys of its own.
  return !(/^(INPUT|TEXTAREA|SELECT)$/.test(focus?.tagName) || focus?.isContentEditable || focus?.closest('[role=tablist], [role=menu], [role=tree], .tgw-side, #tgw-panel'));
}

// --- what some of them do ----------------------------------------------------------------------------------------------------------------

function typed() { return /\S/.test(composer.box.value); }

/** Left and right show other versions of the last reply; right at the newest makes a new one. Not while there is text to move in. */
function turning(step) {
  if (!idle() || !reply() || (document.activeElement === composer.box && composer.box.value)) return false;
  const next = versions().indexOf(reply().data.id) + step;
  return Boolean(versions()[next]) || (step > 0 && !reply().data.greeting);
}

function turn(step) {
  const next = versions()[versions().indexOf(reply().data.id) + step];
  if (next) chat.select(next); else chat.regenerate(reply());
}

async function insert(role, text) {
  const said = text || composer.box.value;
  if (!said.trim()) { toast(t('Type the message first, then insert it.')); composer.focus(); return; }
  if (await chat.insert(role, said) && composer.box.value === said) composer.put('');
}

/** To what is typed, or else anew to the last question. */
function severalAnswers() {
  menu(composer.more, [2, 3, 4].map((n) => [t('{count} answers', { count: n }), () => (typed() ? composer.submit({ n }) : chat.regenerate(reply(), { n })), 'several']));
}

function exported(form) { return files.export([chat.id], /^m/i.test(form) ? 'markdown' : 'json'); }
