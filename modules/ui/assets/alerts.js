// The page's title, and what tells of a reply that ended while nobody looked.
import { ROOT, TITLE, api, memory } from './core.js';
import { session } from './session.js';

const away = () => document.hidden || !document.hasFocus();

export const alerts = {
  text: TITLE, marked: false,

  build() {
    const look = () => { if (this.marked && !away()) this.mark(false); };
    document.addEventListener('visibilitychange', look);
    addEventListener('focus', look);
  },

  /** What the page is called. */
  title(text) {
    this.text = text || TITLE;
    this.mark(this.marked);
  },

  mark(on) {
    this.marked = on;
    document.title = on ? `● ${this.text}` : this.text;
  },

  /** A reply has ended. */
  finished(message) {
    const { id, state } = message.data || message;
    if (!away() || state === 'stopped') return;
    this.mark(true);
    if (session.values.sound === false || memory.get('tgw.sounded') === id) return;  // one of several tabs is enough
    memory.set('tgw.sounded', id);
    this.play();
  },

  async play() {
    const library = await api('GET', 'chat/library').catch(() => ({}));
    if (library.notification) new Audio(new URL('notification', ROOT)).play().catch(() => {});  // a browser may refuse before the first click
  },
};
