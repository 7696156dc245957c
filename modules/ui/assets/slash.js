// A list over the box while a command is typed: "/" at its beginning. What is no command is a message; a command that cannot be done now is neither.
import { el, icon, t } from './core.js';
import { composer } from './composer.js';
import { commands } from './commands.js';
import { prompts } from './prompts.js';

const MOST = 60;  // rows: what is further down is found by typing

export const slash = {
  items: [], at: 0,

  build() {
    this.el = el('ul.tgw-slash', { id: 'tgw-slash', role: 'listbox', hidden: true, 'aria-label': t('Commands') });
    this.el.addEventListener('pointerdown', (e) => e.preventDefault());  // the box keeps the focus
    this.el.addEventListener('click', (e) => { const row = e.target.closest('li'); if (row) this.choose([...this.el.children].indexOf(row)); });
    return this.el;
  },

  get open() { return !this.el.hidden; },

  update() {
    const text = composer.box.value;
    if (!text.startsWith('/')) this.refused = false;
    const typed = !this.refused && /^\/([^\s/]*)(?:[ \t]([^]*))?$/u.exec(text);
    if (!typed) { this.close(); return; }
    this.found(typed[1].toLowerCase(), typed[2]);
    prompts.names().then((names) => { if (names !== this.names && composer.box.value === text) { this.names = names; this.found(typed[1].toLowerCase(), typed[2]); } });
  },

  /** Show what `name`, or all of it with `rest`, may mean. */
  found(name, rest) {
    const whole = rest === undefined ? name : `${name} ${rest.toLowerCase()}`;
    const known = commands().filter((each) => each.name && (!each.when || each.when()));
    const named = (each, fits) => [each.name, ...(each.also || [])].some(fits);
    const fitting = rest === undefined
      ? known.filter((each) => named(each, (own) => own.startsWith(name)))
      : known.filter((each) => each.argument && each.name !== 'prompt' && named(each, (own) => own === name));
    const wanted = name === 'prompt' && rest !== undefined ? rest.trim().toLowerCase() : whole;
    const texts = (this.names || []).filter((each) => each.toLowerCase().startsWith(wanted) || each.toLowerCase().includes(` ${wanted}`));
    this.items = [
      ...fitting.map((each) => ({ name: `/${each.name}`, argument: each.argument, label: each.label, symbol: each.icon, run: () => this.run(each, rest?.trim()) })),
      ...texts.map((each) => ({ name: each, label: t('Prompt'), symbol: 'doc', run: () => { composer.put(''); prompts.use(each); } })),
    ].slice(0, MOST);
    this.show();
  },

  run(command, argument) {
    if (command.argument && !command.optional && !argument) { composer.put(`/${command.name} `); this.update(); return; }
    composer.put('');
    command.run(argument || '');
  },

  show() {
    this.el.hidden = !this.items.length;
    this.el.replaceChildren(...this.items.map((item, n) => el('li', { id: `tgw-slash-${n}`, role: 'option' }, icon(item.symbol || 'on'),
      el('strong', { textContent: item.name, dir: 'auto' }), item.argument ? el('em', { textContent: item.argument }) : null, el('span', { textContent: item.label }))));
    this.mark(0);
  },

  mark(at) {
    this.at = at;
    [...this.el.children].forEach((row, n) => row.setAttribute('aria-selected', String(n === at)));
    this.el.children[at]?.scrollIntoView({ block: 'nearest' });
    const told = { role: 'combobox', 'aria-expanded': 'true', 'aria-controls': this.el.id, 'aria-activedescendant': `tgw-slash-${at}` };
    for (const [name, value] of Object.entries(told)) {
      if (this.open) composer.box.setAttribute(name, value); else composer.box.removeAttribute(name);
    }
  },

  close() {
    this.items = [];
    this.show();
  },

  choose(at) {
    const item = this.items[at];
    this.close();
    item?.run();
  },

  /** The command that `text` is, where it cannot be done now; '' else, and after Esc. */
  impossible(text) {
    const typed = !this.refused && /^\/([^\s/]+)(?:[ \t]+(\S[^]*))?\s*$/u.exec(text);
    const own = (each) => each.name && [each.name, ...(each.also || [])].includes(typed[1].toLowerCase()) && (each.argument || !typed[2]);
    return typed && commands().some(own) ? `/${typed[1]}` : '';
  },

  /** A key in the box; true if it was for this list. */
  key(e) {
    if (!this.open && e.key === 'Escape') this.refused = composer.box.value.startsWith('/');
    if (!this.open || e.isComposing || e.keyCode === 229 || e.ctrlKey || e.altKey || e.metaKey) return false;
    const step = { ArrowDown: 1, ArrowUp: -1 }[e.key];
    const chosen = e.key === 'Tab' || (e.key === 'Enter' && !e.shiftKey);
    if (step) this.mark((this.at + step + this.items.length) % this.items.length);
    else if (chosen) this.choose(this.at);
    else if (e.key === 'Escape') { this.refused = true; this.close(); }
    else return false;
    e.preventDefault();
    e.stopPropagation();
    return true;
  },
};
