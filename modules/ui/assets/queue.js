// Messages that wait until the reply that is being written has ended.
import { el, button, icon, memory, t, toast } from './core.js';
import { chat } from './chat.js';
import { composer } from './composer.js';
import { secret } from './drafts.js';

const EACH = 5;  // messages that may wait in one conversation
const MOST = 40;  // in all of them
const LONGEST = 20000;  // characters: what is longer stays in the box

/** This tab, also after a reload: only the tab in which a message was queued sends it, so that it is sent once. */
function ownName() {
  try { return (window.sessionStorage['tgw.tab'] ||= `${Date.now()}-${Math.random()}`); } catch { return 'only'; }
}

export const queue = {
  secret: [], sending: false, held: false,

  build() {
    this.tab = ownName();
    this.el = el('ul.tgw-queue', { hidden: true, 'aria-label': t('Queued messages') });
    addEventListener('storage', (e) => { if (e.key === 'tgw.queue') this.show(); });
    return this.el;
  },

  get stored() { try { return JSON.parse(memory.get('tgw.queue') || '[]'); } catch { return []; } },

  /** What waits in the conversation shown, oldest first. */
  get here() { return chat.id ? [...this.stored, ...this.secret].filter((each) => each.conversation === chat.id) : []; },

  write(change) {
    const kept = change([...this.stored, ...this.secret]);
    this.secret = kept.filter((each) => secret(each.conversation));
    const saved = memory.set('tgw.queue', JSON.stringify(kept.filter((each) => !secret(each.conversation))));
    this.show();
    composer.refresh();
    return saved;
  },

  /** Whether it was taken. */
  add(text) {
    if (this.here.length >= EACH || this.stored.length >= MOST || text.length > LONGEST) {
      toast(t('No more can be queued now. Send it when the reply has ended.'));
      return false;
    }
    this.held = false;
    return this.write((all) => [...all, { conversation: chat.id, id: `${Date.now()}-${Math.random()}`, text, tab: this.tab }]);
  },

  remove(item) { this.write((all) => all.filter((each) => each.id !== item.id)); },

  edit(item) {
    this.remove(item);
    composer.put(composer.box.value.trim() ? `${item.text}\n${composer.box.value}` : item.text);
  },

  /** Called whenever something may have ended: the next message of this tab follows a reply that came to its end. */
  refresh() {
    if (this.drawn !== chat.id || this.idle !== !chat.running) this.show();
    const last = chat.last()?.data;
    const ended = last?.role === 'assistant' && last.state === 'done' && !last.group && !chat.columns;  // else one of several answers is to be chosen first
    if (ended && !this.held && !this.sending && !chat.busy && this.here.some((each) => each.tab === this.tab)) this.soon ??= setTimeout(() => this.follow());
  },

  follow() {
    this.soon = undefined;
    const next = this.here.find((each) => each.tab === this.tab);
    if (next && !chat.running && !chat.busy && !this.held) this.send(next);
  },

  async send(item) {
    if (!item || this.sending || chat.running || chat.busy) return;
    this.sending = true;
    this.remove(item);
    const sent = await composer.post(item.text);
    this.sending = false;
    this.held = !sent;  // until somebody asks again: what was said against it would be said again
    if (sent) this.refresh(); else this.write((all) => [item, ...all]);  // its reply may have ended before its answer came
  },

  show() {
    this.drawn = chat.id;
    this.idle = !chat.running;
    const items = this.here;
    this.el.hidden = !items.length;
    this.el.replaceChildren(...items.map((item) => el('li', {}, icon('clock'),
      el('span', { textContent: t('Queued: {text}', { text: item.text }), title: item.text.slice(0, 500), dir: 'auto' }),
      this.idle ? button('send', t('Send now'), () => { this.held = false; this.send(item); }) : null,
      button('pen', t('Edit this queued message'), () => this.edit(item)),
      button('no', t('Remove this queued message'), () => this.remove(item)))));
  },
};
