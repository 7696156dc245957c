// The bar over the conversation: its title, the model, what can be opened beside it.
import { el, icon, button, api, attempt, menu, t } from './core.js';
import { chat } from './chat.js';
import { sidebar } from './sidebar.js';
import { model, openTab } from './model.js';
import { alerts } from './alerts.js';
import { loadModel, showPanel, startNew } from './main.js';

/** A model's name without its folder and ending. */
const short = (name) => (name || '').split('/').at(-1).replace(/\.gguf$/i, '');

export const head = {
  build() {
    this.name = el('span', { dir: 'auto' });
    this.title = el('button.tgw-head-title', { type: 'button', title: t('Rename (click)'), onclick: () => this.rename() }, this.name);
    this.none = el('span.tgw-head-title', { textContent: t('New chat') });
    this.secret = el('span.tgw-head-secret', { hidden: true, title: t('Nothing of this chat is saved: it is gone when the server ends.') }, icon('mask'), el('span', { textContent: t('Incognito') }));
    this.model = el('button.tgw-head-model', { type: 'button', onclick: () => this.choose() }, el('i'), el('span'), icon('caret'), el('progress', { max: 1, hidden: true, 'aria-label': t('Loading') }));
    this.branches = button('tree', t('All branches of this chat'), () => this.tree());
    this.el = el('div.tgw-head', {},
      button('side', t('Show conversations'), () => sidebar.toggle(true), 'button.tgw-icon.tgw-head-list'), this.none, this.title, this.secret, this.model, this.branches,
      button('plus', t('New chat'), () => startNew(), 'button.tgw-icon.tgw-head-new'), button('panel', t('Settings of this chat (Ctrl+S)'), () => showPanel()));
    this.retitle('');
    this.paint();
    return this.el;
  },

  /** Show the title of the conversation, here and as the page's. */
  retitle(title) {
    alerts.title(title);
    if (this.renamed !== chat.id) this.field?.onblur();  // what is told of this chat may not cut its reader short
    this.name.textContent = title || '';
    this.title.hidden = !chat.id || Boolean(this.field);
    this.none.hidden = Boolean(chat.id);
    this.secret.hidden = !chat.incognito;
    this.branches.hidden = !chat.id;
  },

  /** Give the conversation another title: `title`, or what is then typed. */
  rename(title) {
    if (!chat.id || this.field) return;
    if (title) { this.save(title); return; }
    const [id, former] = [chat.id, this.name.textContent];
    this.renamed = id;
    const field = this.field = el('input.tgw-head-field', { value: former, 'aria-label': t('Title'), dir: 'auto' });
    const done = (save, back) => {
      if (this.field !== field) return;  // taking it away is a blur too
      this.field = null;
      this.title.hidden = false;
      field.remove();
      if (back) this.title.focus();
      const typed = field.value.trim();
      if (save && typed && typed !== former) this.save(typed, id);
    };
    field.onkeydown = (e) => {
      e.stopPropagation();
      if (e.key === 'Enter' && !e.isComposing) { e.preventDefault(); done(true, true); }
      if (e.key === 'Escape') done(false, true);
    };
    field.onblur = () => done(true);
    this.title.hidden = true;
    this.title.before(field);
    field.focus();
    field.select();
  },

  async save(title, id = chat.id) {
    if (!await attempt(() => api('PATCH', `chat/conversations/${encodeURIComponent(id)}`, { title }))) return;
    sidebar.changed({ id, title });
    if (id === chat.id) chat.retitle(title);
  },

  async tree() {
    if (!chat.id) return;
    const { openTree } = await import('./tree.js');
    openTree(chat.id);
  },

  // --- the model ---------------------------------------------------------------------------------------------------------------------

  /** In multi-user mode the model is not chosen here. */
  get choosable() { return openTab.exists('model'); },

  async choose() {
    const loading = model.status.state === 'loading';
    const names = loading ? [] : await window.tgw.models();
    menu(this.model, [
      ...names.map((name) => [short(name), () => { if (name !== model.status.name || model.status.state !== 'ready') loadModel(name); }, name === model.status.name ? 'yes' : null]),
      loading ? [t('Cancel loading'), () => window.tgw.cancelLoad(), 'no'] : null,
      [t('Options of the model…'), () => openTab('model'), 'swap'],
    ]);
  },

  /** Show what model.status says. */
  paint() {
    const { state, name, progress } = model.status;
    const percent = Math.round((progress || 0) * 100);
    const words = { none: t('No model'), loading: t('Loading {name} {percent} %', { name: short(name), percent }), ready: short(name), failed: t('Model failed to load') }[state];
    const [, text, , bar] = this.model.children;
    this.model.dataset.state = state;
    this.model.disabled = !this.choosable;
    this.model.title = this.choosable ? t('{model}: change the model', { model: words }) : words;
    this.model.setAttribute('aria-label', this.model.title);
    text.textContent = words;
    bar.hidden = state !== 'loading';
    bar.value = progress || 0;
  },
};
