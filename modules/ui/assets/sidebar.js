// The list of conversations.
import { PHONE, icon, el, button, near, later, api, memory, attempt, root } from './core.js';
import { chat } from './chat.js';
import { setConversation, startNew } from './main.js';

export const sidebar = {
  items: new Map(), next: null, query: '', ticket: 0,

  build() {
    this.list = el('ul.tgw-list', { 'aria-label': 'Conversations' });
    this.more = el('div.tgw-edge');
    this.empty = el('p.tgw-none', { hidden: true });
    this.field = el('input', { type: 'search', placeholder: 'Search conversations', 'aria-label': 'Search conversations', autocomplete: 'off' });
    const search = later(120, () => this.load());
    this.field.oninput = search;
    this.field.onkeydown = (e) => { if (e.key === 'ArrowDown') { e.preventDefault(); this.list.querySelector('a')?.focus(); } };
    this.el = el('aside.tgw-side', { 'aria-label': 'Conversations' },
      el('div.tgw-sidehead', {},
        el('button.tgw-new', { type: 'button', onclick: () => startNew() }, icon('plus'), 'New chat'),
        button('side', 'Hide conversations', () => this.toggle(false))),
      el('label.tgw-search', {}, icon('search'), this.field),
      el('nav.tgw-listbox', { 'aria-label': 'Conversations' }, this.list, this.empty, this.more));
    this.shade = el('div.tgw-shade', { onclick: () => this.toggle(false) });
    this.ending = near(this.more, this.list.parentNode, '300px', () => { if (this.next) this.load(true); });
    this.list.addEventListener('keydown', (e) => this.keys(e));
    return [this.el, this.shade];
  },

  toggle(open) {
    root.classList.toggle('closed', !open);
    if (!PHONE.matches) memory.set('tgw.side', open ? '' : 'closed');
  },

  async load(more = false) {
    if (more && this.loadingMore) return;
    const ticket = more ? this.ticket : ++this.ticket;
    const cursor = more ? this.next : '';
    this.loadingMore = more;
    const query = this.field.value.trim();
    const page = await attempt(() => api('GET', `chat/conversations?query=${encodeURIComponent(query)}&before=${encodeURIComponent(cursor)}`));
    this.loadingMore = false;
    if (!page || ticket !== this.ticket) return;
    this.query = query;
    if (!more) { this.items.clear(); this.list.textContent = ''; }
    this.next = page.next;
    for (const item of page.items) this.add(item);
    this.hint();
    this.ending.again();
  },

  hint() {
    this.empty.hidden = this.items.size > 0;
    this.empty.textContent = this.query ? 'Nothing found. Every word must occur in the conversation.' : 'Your conversations will be listed here. They stay on this machine.';
  },

  add(item) {
    if (this.items.has(item.id)) this.items.get(item.id).remove();
    const title = el('span.tgw-title', { textContent: item.title, dir: 'auto' });
    const open = el('a', { href: `#c=${encodeURIComponent(item.id)}` }, title);
    if (item.snippet?.length) {
      open.append(el('span.tgw-snippet', { dir: 'auto' }, ...item.snippet.map(([text, match]) => (match ? el('mark', { textContent: text }) : text))));
    }
    open.onclick = (e) => { if (!(e.ctrlKey || e.metaKey || e.shiftKey)) { e.preventDefault(); setConversation(item.id); if (PHONE.matches) this.toggle(false); } };
    open.ondblclick = () => this.rename(row);
    const row = el('li', {}, open, el('span.tgw-tools', {},
      button('pen', 'Rename (F2)', () => this.rename(row)), button('bin', 'Delete', () => this.askDelete(row))));
    row.item = item;
    row.classList.toggle('running', Boolean(item.running));
    row.classList.toggle('current', item.id === chat.id);
    this.items.set(item.id, row);
    this.list.insertBefore(row, this.query ? null : this.place(item.updated));
  },

  place(updated) {
    let at = this.list.firstChild;
    while (at && at.item.updated > updated) at = at.nextSibling;
    return at;
  },

  changed(item) {
    const row = this.items.get(item.id);
    if (item.id === chat.id && item.title) chat.retitle(item.title);
    if (!row) { if (!this.query) this.add(item); this.hint(); return; }
    const moves = !this.query && item.updated > row.item.updated && row !== this.list.firstChild;
    Object.assign(row.item, item);
    row.classList.toggle('running', Boolean(row.item.running));
    if (!row.classList.contains('busy')) row.querySelector('.tgw-title').textContent = row.item.title;
    if (moves) { row.remove(); this.list.insertBefore(row, this.place(row.item.updated)); }
  },

  gone(id) {
    this.items.get(id)?.remove();
    this.items.delete(id);
    this.hint();
    if (id === chat.id) setConversation(null, true);
  },

  mark(id) {
    this.list.querySelector('.current')?.classList.remove('current');
    this.items.get(id)?.classList.add('current');
  },

  /** Put `inside` in the place of the row's contents until close() is called. */
  replace(row, inside) {
    const former = [...row.childNodes];
    const focus = row.querySelector('a');
    row.classList.add('busy');
    row.replaceChildren(inside);
    return () => { if (!row.classList.contains('busy')) return; row.classList.remove('busy'); row.replaceChildren(...former); focus.focus(); };
  },

  rename(row) {
    if (row.classList.contains('busy')) return;
    const field = el('input.tgw-rename', { value: row.item.title, 'aria-label': 'New name', maxLength: 200 });
    const close = this.replace(row, field);
    const done = async (save) => {
      const title = field.value.trim();
      field.onblur = null;
      close();
      if (!save || !title || title === row.item.title) return;
      if (await attempt(() => api('PATCH', `chat/conversations/${encodeURIComponent(row.item.id)}`, { title }))) this.changed({ ...row.item, title });
    };
    field.onkeydown = (e) => {
      e.stopPropagation();
      if (e.key === 'Enter' && !e.isComposing) { e.preventDefault(); done(true); }
      if (e.key === 'Escape') done(false);
    };
    field.onblur = () => done(true);
    field.focus();
    field.select();
  },

  askDelete(row) {
    if (row.classList.contains('busy')) return;
    const yes = button('yes', 'Yes, delete', async () => {
      close();
      if (await attempt(() => api('DELETE', `chat/conversations/${encodeURIComponent(row.item.id)}`))) this.gone(row.item.id);
    }, 'button.tgw-icon.danger');
    const no = button('no', 'No, keep it', () => close());
    const asked = el('span.tgw-confirm', { role: 'group', 'aria-label': 'Delete this conversation?' }, el('span', { textContent: 'Delete?' }), yes, no);
    const close = this.replace(row, asked);
    asked.onkeydown = (e) => { if (e.key === 'Escape') { e.stopPropagation(); close(); } };
    no.focus();
  },

  keys(e) {
    const row = e.target.closest('li');
    if (!row || e.target.tagName !== 'A') return;
    const go = { ArrowDown: row.nextSibling, ArrowUp: row.previousSibling, Home: this.list.firstChild, End: this.list.lastChild };
    if (e.key in go) { e.preventDefault(); (go[e.key]?.querySelector('a') || (e.key === 'ArrowUp' ? this.field : null))?.focus(); }
    if (e.key === 'F2') { e.preventDefault(); this.rename(row); }
    if (e.key === 'Delete') { e.preventDefault(); this.askDelete(row); }
  },
};
