// Several conversations at once: which are chosen, and the bar of what can be done with them.
import { icon, el, button, menu, t } from './core.js';
import { removeChats } from './acts.js';
import { sidebar } from './sidebar.js';
import { move, tags } from './manage.js';
import { files } from './files.js';

export const selection = {
  on: false, chosen: new Set(), from: null,

  build() {
    this.count = el('strong', { role: 'status' });
    this.whole = el('button.tgw-link', { type: 'button', textContent: t('All'), title: t('Select all (Ctrl+A)'), onclick: () => this.all() });
    this.tools = el('div.tgw-does', {},
      this.tool('folder', t('Move'), () => move([...this.chosen])),
      this.tool('tag', t('Tag'), () => tags([...this.chosen])),
      this.tool('export', t('Export'), (anchor) => this.export(anchor)),
      this.tool('bin', t('Delete'), () => removeChats([...this.chosen])));
    this.bar = el('div.tgw-selected', { hidden: true, role: 'toolbar', 'aria-label': t('Selected conversations') },
      el('div.tgw-chosen', {}, this.count, this.whole, button('no', t('End selecting (Esc)'), () => this.end())), this.tools);
    this.bar.onkeydown = (e) => { if (e.key === 'Escape') { e.preventDefault(); this.end(); } };
    return this.bar;
  },

  tool(name, label, action) {
    const made = el('button', { type: 'button', onclick: () => action(made) }, icon(name), el('span', { textContent: label }));
    return made;
  },

  /** Select from now on, `row` first. */
  begin(row = null) {
    if (!this.on) {
      this.on = true;
      this.from = null;
      this.bar.hidden = false;
      sidebar.el.classList.add('selecting');
      sidebar.rows().forEach((each) => this.mark(each));
    }
    if (row) this.put(row, true);
    this.show();
    (row || sidebar.list.querySelector('li'))?.querySelector('a')?.focus({ preventScroll: true });
  },

  end() {
    if (!this.on) return;
    const within = this.bar.contains(document.activeElement);
    this.on = false;
    this.chosen.clear();
    this.bar.hidden = true;
    sidebar.el.classList.remove('selecting');
    sidebar.rows().forEach((each) => this.mark(each));
    if (within) (sidebar.stop?.querySelector('a') || sidebar.field).focus({ preventScroll: true });
  },

  /** A row was clicked: it changes, and with `range` every row from the last one clicked on is taken. */
  click(row, range = false) {
    if (!this.on) this.begin();
    if (range) this.reach(this.from?.isConnected ? this.from : sidebar.list.querySelector('.current') || row, row);
    else this.put(row, !this.chosen.has(row.item.id));
    row.querySelector('a').focus({ preventScroll: true });
    this.show();
  },

  /** Take all rows between two. */
  reach(from, to) {
    if (!this.on) this.begin();
    const rows = sidebar.rows();
    const [first, last] = [rows.indexOf(from), rows.indexOf(to)].sort((a, b) => a - b);
    rows.slice(first, last + 1).forEach((row) => this.put(row, true));
    this.from = from;
    to.querySelector('a').focus({ preventScroll: true });
    this.show();
  },

  /** Take everything that the list would show, down to its end. */
  async all() {
    this.whole.disabled = true;
    for (let before; sidebar.next && sidebar.next !== before;) { before = sidebar.next; await sidebar.further(); }
    this.whole.disabled = false;
    if (this.on) sidebar.rows().forEach((row) => this.put(row, true));
    this.show();
  },

  put(row, chosen) {
    if (chosen) this.chosen.add(row.item.id); else this.chosen.delete(row.item.id);
    this.from = row;
    this.mark(row);
  },

  /** Let a row show whether it is chosen. */
  mark(row) {
    const link = row.querySelector('a');
    const chosen = this.on && this.chosen.has(row.item.id);
    row.classList.toggle('chosen', chosen);
    if (!link) return;
    if (this.on) { link.setAttribute('role', 'checkbox'); link.setAttribute('aria-checked', String(chosen)); } else if (link.hasAttribute('role')) {
      link.removeAttribute('role');
      link.removeAttribute('aria-checked');
    }
  },

  show() {
    this.count.textContent = t('{count} selected', { count: this.chosen.size });
    for (const each of this.tools.children) each.disabled = !this.chosen.size;
  },

  /** What a key on `row` is meant for: all that are chosen, if this one is among them. */
  of(row) { return this.chosen.has(row.item.id) ? [...this.chosen] : [row.item.id]; },

  forget(id) {
    if (!this.chosen.delete(id)) return;
    if (this.chosen.size) this.show(); else this.end();
  },

  /** The list was read again: what it no longer shows is no longer chosen. Nobody deletes what they do not see. */
  keep(items) {
    for (const id of this.chosen) if (!items.has(id)) this.chosen.delete(id);
    if (this.on) this.show();
  },

  export(anchor) {
    menu(anchor, [
      [t('Export as JSON'), () => files.export([...this.chosen], 'json'), 'export'],
      [t('Export as Markdown'), () => files.export([...this.chosen], 'markdown'), 'export'],
    ]);
  },
};
