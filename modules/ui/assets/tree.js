// All branches of a conversation, to jump between.
import { PHONE, icon, el, api, attempt, dialog, number, t } from './core.js';
import { chat } from './chat.js';

const HEIGHT = () => (PHONE.matches ? 46 : 38);  // of a row, pixels
const SPARE = 8;  // rows made above and below those in sight
const DEEPEST = 8;  // rows are not indented further, so that their texts have room

/** Show the branches of conversation `id`. `from`: the message at which the list begins in sight; else the end of the branch shown. */
export async function openTree(id, from = null) {
  const found = await attempt(() => api('GET', `chat/tree/${encodeURIComponent(id)}`));
  if (!found || id !== chat.id) return;
  const rows = rowsOf(found.nodes, found.tip);
  const view = new Rows(rows, (row) => { shown.close(); chat.goTo(row.first.id, row.last.id, row.shown); });
  const told = t('{count} messages. A row is a stretch without branches; what is further in could stand in its place. Enter goes there.', { count: number.format(found.nodes.length) });
  const shown = dialog(t('All branches of this chat'), el('p.tgw-told', { textContent: told }), view.el);
  view.begin(rows.findIndex((row) => row.ids.has(from ?? found.tip)));
}

/** The rows of a tree, as chess notation writes games: the branch shown goes on at the left, what else could follow stands below it, further in.
 *  Nodes come with parents first and versions oldest first. Each row: {first, last, ids, depth, shown, tip}. */
function rowsOf(nodes, tip) {
  const below = new Map([[null, []]]);
  for (const node of nodes) below.set(node.id, []);
  for (const node of nodes) (below.get(node.parent) || below.get(null)).push(node);
  const byId = new Map(nodes.map((node) => [node.id, node]));
  const path = new Set();
  for (let at = byId.get(tip); at; at = byId.get(at.parent)) path.add(at.id);
  const rows = [];
  const waiting = [{ versions: below.get(null), depth: 0 }];  // a list, not calls within calls: a chat can be deep
  while (waiting.length) {
    const { versions, depth } = waiting.pop();
    if (!versions.length) continue;
    const main = versions.find((node) => path.has(node.id)) || versions.at(-1);
    const row = { first: main, last: main, ids: new Set([main.id]), depth, shown: path.has(main.id) };
    for (let next = below.get(main.id); next.length === 1; next = below.get(row.last.id)) {
      // The branch shown may end within the stretch: what follows is another row.
      if (row.last.id === tip) break;
      [row.last] = next;
      row.ids.add(row.last.id);
    }
    row.tip = row.ids.has(tip);
    rows.push(row);
    waiting.push({ versions: below.get(row.last.id), depth });
    for (const node of versions.toReversed()) if (node !== main) waiting.push({ versions: [node], depth: depth + 1 });
  }
  return rows;
}

/** Any number of rows, of which only those in sight are made. One stop of Tab; arrows move in it. */
class Rows {
  constructor(rows, choose) {
    [this.rows, this.choose, this.height, this.at] = [rows, choose, HEIGHT(), 0];
    this.sheet = el('div', { role: 'none' });
    this.sheet.style.height = `${rows.length * this.height}px`;
    this.el = el('div.tgw-tree', { tabIndex: 0, role: 'tree', 'aria-label': t('Branches') }, this.sheet);
    this.el.style.setProperty('--rows', this.sheet.style.height);
    this.el.addEventListener('scroll', () => this.draw(), { passive: true });
    this.el.onkeydown = (e) => this.key(e);
    this.el.onclick = (e) => { const row = e.target.closest('[role=treeitem]'); if (row) this.choose(rows[row.dataset.at]); };
  }

  begin(at) {
    this.at = Math.max(0, at);
    this.el.scrollTop = (this.at + 0.5) * this.height - this.el.clientHeight / 2;
    this.draw();
    this.el.focus({ preventScroll: true });
  }

  draw() {
    const from = Math.max(0, Math.floor(this.el.scrollTop / this.height) - SPARE);
    const to = Math.min(this.rows.length, Math.ceil((this.el.scrollTop + this.el.clientHeight) / this.height) + SPARE);
    const wanted = new Set([this.at]);  // the active row is always there, for screen readers
    for (let at = from; at < to; at += 1) wanted.add(at);
    const made = new Map([...this.sheet.children].map((row) => [Number(row.dataset.at), row]));
    for (const [at, row] of made) row.setAttribute('aria-selected', String(at === this.at));
    this.sheet.replaceChildren(...[...wanted].filter((at) => this.rows[at]).sort((a, b) => a - b).map((at) => made.get(at) || this.make(at)));
    this.el.setAttribute('aria-activedescendant', `tgw-branch-${this.at}`);
  }

  make(at) {
    const { first, ids, depth, shown, tip } = this.rows[at];
    const who = first.role === 'user' ? t('You') : t('Reply');
    const count = ids.size > 1 ? t('{count} messages', { count: number.format(ids.size) }) : '';
    const text = first.text.trim() || (first.state === 'running' ? t('Being written…') : t('Empty'));
    const made = el(`div.tgw-branch${shown ? '.shown' : ''}`, {
      id: `tgw-branch-${at}`, role: 'treeitem', 'data-at': at, 'aria-level': depth + 1, 'aria-setsize': this.rows.length, 'aria-posinset': at + 1,
      'aria-selected': String(at === this.at), 'aria-label': [`${who}: ${text}`, count, tip && t('here')].filter(Boolean).join(', '),
    }, icon(first.role === 'user' ? 'user' : 'chat'), el('span', { textContent: text, dir: 'auto' }), el('small', { textContent: count }), tip ? el('b', { textContent: t('here') }) : null);
    if (shown) made.setAttribute('aria-current', 'true');
    made.style.top = `${at * this.height}px`;
    made.style.height = `${this.height}px`;
    made.style.setProperty('--depth', Math.min(depth, DEEPEST));
    return made;
  }

  key(e) {
    const page = Math.max(1, Math.floor(this.el.clientHeight / this.height) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.rows.length, End: this.rows.length };
    if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); this.choose(this.rows[this.at]); }
    else if (e.key in steps) { e.preventDefault(); this.go(this.at + steps[e.key]); }
    else if (e.key === 'ArrowLeft') { e.preventDefault(); this.out(); }
    else if (e.key === 'ArrowRight' && this.rows[this.at + 1]?.depth > this.rows[this.at].depth) { e.preventDefault(); this.go(this.at + 1); }
  }

  /** To the row that this one could stand in the place of. */
  out() {
    const { depth } = this.rows[this.at];
    for (let at = this.at - 1; at >= 0; at -= 1) if (this.rows[at].depth < depth) { this.go(at); return; }
  }

  go(at) {
    this.at = Math.max(0, Math.min(this.rows.length - 1, at));
    const [top, room] = [this.at * this.height, this.el.clientHeight - this.height];
    if (this.el.scrollTop > top) this.el.scrollTop = top;
    if (this.el.scrollTop < top - room) this.el.scrollTop = top - room;
    this.draw();
  }
}
