// The list of conversations.
import { ICONS, PHONE, icon, el, button, near, later, api, memory, attempt, root, t } from './core.js';
import { chat } from './chat.js';
import { composer } from './composer.js';
import { setConversation, startNew } from './main.js';
import { FOUND, groupOf } from './dates.js';
import { filters, hue, listPath } from './filters.js';
import { selection } from './selection.js';
import { listMenu, removeChats, rename, rowMenu } from './acts.js';
import { files } from './files.js';

const LEAD = 14;  // characters before a search hit

Object.assign(ICONS, {
  more: 'M6 12h.01M12 12h.01M18 12h.01', caret: 'M7 10l5 5 5-5', folder: 'M4 6h6l2 2h8v11H4z', tag: 'M4 4h8l8 8-8 8-8-8zM8.5 8.5h.01',
  pin: 'M9 4h6l-1 6 3 3H7l3-3zM12 13v7', import: 'M12 4v11M7.5 10.5L12 15l4.5-4.5M5 19h14', export: 'M12 15V4M7.5 8.5L12 4l4.5 4.5M5 19h14',
  mask: 'M4 11h16M7 11l1.5-6h7L17 11M7.5 14a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5M16.5 14a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5M10 16h4',
  select: 'M5 5h14v14H5zM8.5 12l2.5 2.5 4.5-5',
});

/** Chats dragged onto a folder. */
export const DRAGGED = 'application/x-tgw-chats';

export const sidebar = {
  items: new Map(), groups: new Map(), next: null, query: '', ticket: 0,

  build() {
    this.list = el('div.tgw-groups');
    this.more = el('div.tgw-edge');
    this.empty = el('p.tgw-none', { hidden: true, role: 'status' });
    const name = t('Search conversations');
    this.field = el('input', { type: 'search', placeholder: name, title: t('Ctrl+K'), 'aria-label': name, autocomplete: 'off' });
    this.field.oninput = this.soon;
    this.field.onkeydown = (e) => this.fieldKeys(e);
    const chats = t('Conversations');
    const more = button('caret', t('Menu of the list'), () => listMenu(more), 'button.tgw-icon.tgw-newmore');
    const begin = el('button.tgw-new', { type: 'button', onclick: () => startNew() }, icon('plus'), t('New chat'));
    this.el = el('aside.tgw-side', { 'aria-label': chats },
      el('div.tgw-sidehead', {}, el('div.tgw-begin', {}, begin, more), button('side', t('Hide conversations'), () => this.toggle(false))),
      el('label.tgw-search', {}, icon('search'), this.field),
      filters.build(), files.build(),
      el('nav.tgw-listbox', { 'aria-label': chats }, this.list, this.empty, this.more),
      selection.build());
    this.shade = el('div.tgw-shade', { onclick: () => this.toggle(false) });
    this.ending = near(this.more, this.list.parentNode, '300px', () => { if (this.next) this.further(); });
    this.listen();
    files.takeDropped(this.el);
    return [this.el, this.shade];
  },

  listen() {
    this.list.addEventListener('click', (e) => this.clicked(e));
    this.list.addEventListener('dblclick', (e) => { const row = e.target.closest('a')?.parentNode; if (row && !selection.on) rename(row); });
    this.list.addEventListener('keydown', (e) => this.keys(e));
    this.list.addEventListener('focusin', (e) => this.enter(e.target.closest('li')));
    this.list.addEventListener('contextmenu', (e) => {
      const row = e.target.closest('li');
      if (row && !selection.on && e.target.tagName !== 'INPUT') { e.preventDefault(); rowMenu(row); }
    });
    this.list.addEventListener('dragstart', (e) => {
      const row = e.target.closest?.('li');
      if (row) e.dataTransfer.setData(DRAGGED, JSON.stringify(selection.chosen.has(row.item.id) ? [...selection.chosen] : [row.item.id]));
    });
    document.addEventListener('visibilitychange', () => { if (!document.hidden) this.date(); });
  },

  toggle(open) {
    root.classList.toggle('closed', !open);
    if (!PHONE.matches) memory.set('tgw.side', open ? '' : 'closed');
  },

  /** Go to the search field, from anywhere. */
  search() {
    this.toggle(true);
    this.field.focus();
    this.field.select();
  },

  soon: later(120, () => sidebar.load()),

  /** The list from its beginning. */
  load() {
    this.soon.cancel();
    this.ticket += 1;
    this.coming = null;
    return this.take('');
  },

  /** The page after those that are there. */
  further() {
    if (this.coming) return this.coming;
    const coming = this.take(this.next).finally(() => { if (this.coming === coming) this.coming = null; });
    this.coming = coming;
    return coming;
  },

  async take(before) {
    const [ticket, query] = [this.ticket, this.field.value.trim()];
    const page = await attempt(() => api('GET', listPath({ query, before, ...filters.asked() })));
    if (!page || ticket !== this.ticket) return;
    const focused = this.list.contains(document.activeElement) ? document.activeElement.closest('li').item.id : null;
    if (!before) this.begin(query);
    this.next = page.next;
    for (const item of page.items) this.add(item);
    if (!before) selection.keep(this.items);
    if (focused && !before) this.items.get(focused)?.querySelector('a').focus({ preventScroll: true });
    this.hint();
    this.ending.again();
  },

  /** Empty the list, for what answers `query`. */
  begin(query) {
    this.query = query;
    this.day = new Date().toDateString();
    this.items.clear();
    this.groups.clear();
    this.list.textContent = '';
    filters.soon();
  },

  /** The headings tell of days: on another day the list is made anew. */
  date() {
    const day = new Date().toDateString();
    if (!this.day || this.day === day) return;
    this.day = day;
    this.load();
  },

  /** What is told where there is nothing to list; and Tab must find a row where there is one. */
  hint() {
    if (!this.stop?.isConnected) this.enter(this.items.get(chat.id) || this.list.querySelector('li'));
    this.empty.hidden = this.items.size > 0;
    if (this.items.size) return;
    if (this.query) this.empty.replaceChildren(t('Nothing found. Every word must occur in the conversation.'));
    else if (filters.active) this.empty.replaceChildren(t('No conversation here.'));
    else this.empty.replaceChildren(t('Your conversations will be listed here. They stay on this machine. Files of other programs can be dropped here.'));
    const everywhere = () => el('button.tgw-link', { type: 'button', textContent: t('Look in all conversations'), onclick: () => filters.clear() });
    if (filters.active) this.empty.append(' ', everywhere());
  },

  // --- rows ---------------------------------------------------------------------------------------------------------------------------

  add(item) {
    if (this.items.has(item.id)) { this.changed(item); return; }  // it came as news before its page did
    const row = el('li', { draggable: true });
    row.item = { folder: '', tags: [], pinned: false, incognito: item.id.startsWith('incognito-'), ...item };
    this.items.set(item.id, row);
    this.fill(row);
    this.settle(row);
  },

  /** Make the contents of a row anew. */
  fill(row) {
    const item = row.item;
    const tabIndex = row === this.stop ? 0 : -1;
    const open = el('a', { href: `#c=${encodeURIComponent(item.id)}`, tabIndex, title: [item.title, item.folder].filter(Boolean).join(' — ') },
      el('span.tgw-title', { dir: 'auto' }, item.incognito ? icon('mask') : null, item.title));
    const pieces = (item.snippet || []).map(([text, match]) => (match ? el('mark', { textContent: text }) : text));
    if (typeof pieces[0] === 'string' && pieces[0].length > LEAD) pieces[0] = `…${[...pieces[0]].slice(-LEAD).join('')}`;  // the hit is to be seen
    if (pieces.length) open.append(el('span.tgw-snippet', { dir: 'auto' }, ...pieces));
    if (item.tags.length) open.append(el('span.tgw-tags', {}, ...item.tags.map((name) => this.chip(name))));
    const more = button('more', t('What can be done with {title}', { title: item.title }), null);
    more.tabIndex = tabIndex;
    more.setAttribute('aria-haspopup', 'menu');
    more.title = t('More');
    row.replaceChildren(open, el('span.tgw-tools', {}, more));
    row.classList.toggle('running', Boolean(item.running));
    row.classList.toggle('pinned', Boolean(item.pinned));
    this.markRow(row, item.id === chat.id);
    selection.mark(row);
  },

  chip(name) {
    const chip = el('span.tgw-tag', { textContent: name });
    chip.style.setProperty('--tgw-hue', hue(name));
    return chip;
  },

  /** Put a row where it belongs. Where it stands right already, nothing is moved: focus and scrolling stay. */
  settle(row) {
    const group = this.query ? FOUND : groupOf(row.item);
    const list = this.place(group);
    const above = (other) => !other || group === FOUND || other.item.updated >= row.item.updated;
    const below = (other) => !other || group === FOUND || other.item.updated <= row.item.updated;
    if (row.parentNode === list && above(row.previousSibling) && below(row.nextSibling)) return;
    const [focus, former] = [row.contains(document.activeElement) ? document.activeElement : null, row.parentNode];
    row.remove();
    let at = above(list.lastChild) ? null : list.firstChild;  // a page's rows come in their order: nearly always at the end, or at the top
    while (at && above(at)) at = at.nextSibling;
    list.insertBefore(row, at);
    this.tidy(former);
    focus?.focus({ preventScroll: true });
  },

  /** The list of a group, with its heading; made when its first row comes. */
  place(group) {
    const known = this.groups.get(group.key);
    if (known) return known;
    const label = group.label();
    const list = el('ul.tgw-list', { 'aria-label': label || t('Found') });
    list.group = group;
    const section = el('section', {}, label ? el('h2.tgw-when', { textContent: label }) : null, list);
    let at = this.list.lastChild;
    while (at && at.lastChild.group.order > group.order) at = at.previousSibling;
    this.list.insertBefore(section, at ? at.nextSibling : this.list.firstChild);
    this.groups.set(group.key, list);
    return list;
  },

  /** Take the heading of a group away with its last row. */
  tidy(list) {
    if (!list || list.childElementCount) return;
    list.parentNode.remove();
    this.groups.delete(list.group.key);
  },

  /** All rows shown, from the top. */
  rows() { return [...this.list.querySelectorAll('li')]; },

  /** The row below (1) or above (-1), over the headings. */
  beside(row, step) {
    const [next, edge] = step > 0 ? ['nextSibling', 'firstChild'] : ['previousSibling', 'lastChild'];
    return row[next] || row.closest('section')?.[next]?.lastChild[edge] || null;
  },

  /** A conversation changed, here or elsewhere; `item` may tell only a part of it. */
  changed(item) {
    this.date();
    const row = this.items.get(item.id);
    if (item.id === chat.id && item.title) chat.retitle(item.title);
    if (!row) { if (item.updated && !this.query && filters.fits(item)) this.add(item); this.hint(); return; }
    const former = row.item;
    row.item = { ...former, ...item, snippet: former.snippet };
    if (`${former.folder}\n${former.tags}` !== `${row.item.folder}\n${row.item.tags}`) filters.soon();
    if (!filters.fits(row.item)) { this.drop(item.id); return; }
    if (row.classList.contains('busy')) return;  // it is filled when the new name is there
    if (['title', 'folder', 'tags', 'pinned', 'running'].some((name) => String(former[name]) !== String(row.item[name]))) this.refill(row);
    if (!this.query) this.settle(row);
  },

  refill(row) {
    const within = row.contains(document.activeElement) && (document.activeElement.tagName === 'A' ? 'a' : 'button');
    this.fill(row);
    if (within) row.querySelector(within).focus({ preventScroll: true });
  },

  /** Take a row out of the list. */
  drop(id) {
    const row = this.items.get(id);
    if (row) {
      const list = row.parentNode;
      const next = row.contains(document.activeElement) ? this.beside(row, 1) || this.beside(row, -1) : null;
      row.remove();
      this.tidy(list);
      next?.querySelector('a').focus();
    }
    this.items.delete(id);
    selection.forget(id);
    this.hint();
    this.ending.again();
  },

  /** A conversation was deleted, here or elsewhere. */
  gone(id) {
    if (this.items.has(id)) filters.soon();
    this.drop(id);
    if (id === chat.id) setConversation(null, true);
  },

  mark(id) {
    this.markRow(this.list.querySelector('.current'), false);
    this.markRow(this.items.get(id), true);
  },

  markRow(row, current) {
    if (!row) return;
    row.classList.toggle('current', current);
    if (current) row.querySelector('a')?.setAttribute('aria-current', 'page'); else row.querySelector('a')?.removeAttribute('aria-current');
  },

  /** The list is one stop of Tab; arrows go through it. This row is where Tab comes back to. */
  enter(row) {
    if (!row || row === this.stop) return;
    const set = (each, index) => each?.querySelectorAll('a, button').forEach((control) => { control.tabIndex = index; });
    set(this.stop, -1);
    set(row, 0);
    this.stop = row;
  },

  // --- pointer and keys ----------------------------------------------------------------------------------------------------------------

  clicked(e) {
    const row = e.target.closest('li');
    const [link, tool, tag] = ['a', '.tgw-tools', '.tgw-tag'].map((each) => e.target.closest(each));
    if (!row || row.classList.contains('busy') || !(link || tool)) return;
    e.preventDefault();
    if (tool) rowMenu(row);
    else if (selection.on || e.ctrlKey || e.metaKey || e.shiftKey) selection.click(row, e.shiftKey);
    else if (tag && !PHONE.matches) filters.choose('tag', tag.textContent);  // on a phone it is too small to be meant
    else this.open(row.item);
  },

  /** Open a conversation, at the message that a search found in it. */
  open({ id, hit }) {
    setConversation(id);
    if (PHONE.matches) this.toggle(false);
    if (hit) chat.find(hit);
  },

  keys(e) {
    const row = e.target.closest('li');
    if (!row || e.target.tagName === 'INPUT') return;
    const [first, last] = [() => this.list.querySelector('li'), () => this.rows().at(-1)];
    const go = { ArrowDown: () => this.beside(row, 1), ArrowUp: () => this.beside(row, -1), Home: first, End: last };
    if (e.key in go) { e.preventDefault(); this.walk(row, go[e.key](), e); return; }
    const held = e.ctrlKey || e.metaKey || e.altKey;
    const remove = () => removeChats(selection.of(row));
    const does = held ? {} : { F2: () => rename(row), Delete: remove, Backspace: remove, ' ': () => selection.click(row) };
    if (selection.on) Object.assign(does, held ? { a: () => selection.all() } : { Escape: () => selection.end() });
    if (e.target.tagName === 'A' && e.key in does) { e.preventDefault(); does[e.key](); }
  },

  walk(row, to, e) {
    if (!to && e.key === 'ArrowUp') { this.field.focus(); return; }
    to?.querySelector('a')?.focus();
    if (to && e.shiftKey) selection.reach(row, to);
  },

  fieldKeys(e) {
    if (e.isComposing) return;
    if (e.key === 'ArrowDown') { e.preventDefault(); this.list.querySelector('a')?.focus(); }
    if (e.key === 'Enter') { e.preventDefault(); this.openFirst(); }
    if (e.key !== 'Escape') return;
    if (this.field.value) { e.preventDefault(); this.field.value = ''; this.load(); } else if (!PHONE.matches && !chat.running) composer.focus();
  },

  /** What Enter in the search field opens: the best hit for what is typed, though the list may still show another. */
  async openFirst() {
    if (!this.field.value.trim()) return;
    await this.load();
    const first = this.list.querySelector('li');
    if (first && this.query === this.field.value.trim()) this.open(first.item);
  },
};
