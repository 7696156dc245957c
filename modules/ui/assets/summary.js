// What the model is told instead of the oldest messages.
import { el, api, attempt, t } from './core.js';

/** A folded card; its reader can change the text. */
export class SummaryCard {
  constructor(chat) {
    this.chat = chat;
    this.area = el('textarea', { rows: 6, 'aria-label': t('Summary'), dir: 'auto', oninput: () => this.look() });
    this.save = el('button.tgw-button.primary', { type: 'button', textContent: t('Save'), onclick: () => this.post(this.area.value) });
    const forget = el('button.tgw-button', { type: 'button', textContent: t('Forget it'), title: t('The messages themselves are sent again, as far as they fit'), onclick: () => this.post('') });
    this.el = el('details.tgw-summary', {}, el('summary', { textContent: t('Summary of the earlier conversation') }),
      el('p', { textContent: t('The model is told this instead of the messages above. Change what is wrong.') }), this.area, el('div.tgw-ends', {}, forget, this.save));
  }

  get edited() { return this.area.value !== (this.text ?? ''); }
  look() { this.save.disabled = !this.edited; }

  /** Show another text, unless one is being typed in this chat. */
  show(text) {
    const edited = this.edited && this.of === this.chat.id;
    this.of = this.chat.id;
    this.text = text;
    if (!edited) this.area.value = text;
    this.look();
  }

  async post(text) {
    if (!await attempt(() => api('PATCH', 'chat/summary', { conversation: this.chat.id, text }))) return;
    this.text = this.area.value = text.trim();
    this.look();
    this.chat.reload();
  }
}
