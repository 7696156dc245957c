// Folders and tags above the list: what is chosen there is what the list shows.
import { icon, el, api, later, t } from './core.js';
import { arrange } from './acts.js';
import { DRAGGED, sidebar } from './sidebar.js';
import { menuOf } from './manage.js';

/** A colour's angle made of a tag's name: the same tag looks the same everywhere. */
export function hue(name) {
  return [...name].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 360, 7);
}

/** The address of a part of the list: {query, before, folder, tag}. */
export function listPath(asked) {
  return `chat/conversations?${Object.entries(asked).map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join('&')}`;
}

export const filters = {
  folder: null, tag: null, folders: [], tags: [],

  build() {
    this.el = el('div.tgw-filters', { hidden: true, role: 'group', 'aria-label': t('Folders and tags') });
    return this.el;
  },

  get active() { return this.folder !== null || this.tag !== null; },

  /** The part of a request for the list. */
  asked() { return { ...(this.folder !== null && { folder: this.folder }), ...(this.tag !== null && { tag: this.tag }) }; },

  /** Whether the list as it is filtered shows `item`. */
  fits(item) { return (this.folder === null || item.folder === this.folder) && (this.tag === null || Boolean(item.tags?.includes(this.tag))); },

  soon: later(150, () => filters.read()),

  async read() {
    const found = await api('GET', 'chat/folders').catch(() => null);  // the list itself says what is wrong
    if (!found) return;
    this.folders = found.folders;
    this.tags = found.tags;
    const known = (list, name) => name === null || list.some(([each]) => each === name);
    const [folder, tag] = [this.folder, this.tag];
    if (!known(this.folders, folder)) this.folder = null;
    if (!known(this.tags, tag)) this.tag = null;
    this.draw();
    if (folder !== this.folder || tag !== this.tag) sidebar.load();
  },

  choose(kind, name) {
    this[kind] = this[kind] === name ? null : name;
    this.draw();
    sidebar.load();
  },

  clear() {
    this.folder = this.tag = null;
    this.draw();
    sidebar.load();
  },

  draw() {
    const focused = this.el.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const made = [...this.folders.map((each) => this.chip('folder', ...each)), ...this.tags.map((each) => this.chip('tag', ...each))];
    this.el.hidden = !made.length;
    this.el.replaceChildren(...made);
    if (focused) made.find((each) => each.dataset.key === focused)?.focus();
  },

  chip(kind, name, count) {
    const mark = kind === 'folder' ? icon('folder') : el('i');
    const chip = el(`button.tgw-filter.${kind}`, { type: 'button', 'aria-pressed': String(this[kind] === name), onclick: () => this.choose(kind, name) },
      mark, el('span', { textContent: name, dir: 'auto' }), el('b', { textContent: count }));
    chip.style.setProperty('--tgw-hue', hue(name));
    chip.dataset.key = `${kind}:${name}`;
    chip.title = kind === 'folder' ? t('Folder: {name}', { name }) : t('Tag: {name}', { name });
    chip.oncontextmenu = (e) => { e.preventDefault(); menuOf(chip, kind, name); };
    takeChats(chip, (ids) => arrange(ids, kind === 'folder' ? { folder: name } : { add_tags: [name] }));
    return chip;
  },
};

/** Let chats of the list be dropped on `target`. */
function takeChats(target, action) {
  const ours = (e) => e.dataTransfer.types.includes(DRAGGED);
  target.ondragover = (e) => { if (ours(e)) { e.preventDefault(); target.classList.add('over'); } };
  target.ondragleave = () => target.classList.remove('over');
  target.ondrop = (e) => {
    target.classList.remove('over');
    if (ours(e)) { e.preventDefault(); action(JSON.parse(e.dataTransfer.getData(DRAGGED))); }
  };
}
