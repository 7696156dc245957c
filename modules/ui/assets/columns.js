// Replies to one question that stand side by side until one of them is chosen.
import { el, write, t } from './core.js';

export class Columns {
  /** `group`: the server's name of these replies; null for an older reply beside a new one, which only this page shows so. */
  constructor(chat, group) {
    this.chat = chat;
    this.group = group;
    this.row = el('div.tgw-row');
    this.hint = el('p.tgw-hint');
    this.el = el('div.tgw-columns', { role: 'group', 'aria-label': t('Replies side by side') }, this.row, this.hint);
  }

  get ids() { return [...this.row.children].map((each) => each.dataset.id); }
  get messages() { return this.ids.map((id) => this.chat.views.get(id)); }

  /** The one from which the conversation goes on if nothing is chosen. */
  get tip() { return this.chat.views.get(this.marked) || this.messages[0]; }

  holds(message) { return message.el.parentNode === this.row; }

  add(message) {
    this.row.append(message.el);
    const models = new Set(this.messages.map((each) => each.data.model));
    this.messages.forEach((each, at) => {
      const ordinal = t('Answer {number}', { number: at + 1 });
      each.aside(models.size > 1 ? `${ordinal} · ${each.data.model || '?'}` : ordinal);
    });
  }

  /** Where there is no room for all of them, what is marked comes into view. */
  mark(id) {
    const other = id !== this.marked;
    this.marked = id;
    this.refresh();
    if (other) this.row.scrollLeft = this.tip.el.offsetLeft - this.row.offsetLeft;
  }

  /** Called when one of them begins or ends. */
  refresh() {
    const { tip } = this;
    for (const message of this.messages) {
      message.el.classList.toggle('marked', message === tip);
      if (message === tip) message.el.setAttribute('aria-current', 'true'); else message.el.removeAttribute('aria-current');
    }
    const running = this.messages.some((message) => message.running);
    write(this.hint, running ? t('To choose one that has ended stops the others.') : t('Choose one. Without a choice the chat goes on from the marked one.'));
  }

  /** Let them stand below each other again, in their order. */
  dissolve() {
    for (const message of this.messages) {
      message.el.classList.remove('marked');
      message.el.removeAttribute('aria-current');
      this.el.before(message.el);
      message.aside(null);
    }
    this.el.remove();
  }
}
