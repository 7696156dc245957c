// Events from the server.
import { ROOT, el, api, t } from './core.js';
import { chat } from './chat.js';
import { sidebar } from './sidebar.js';
import { ahead, composer } from './composer.js';
import { session } from './session.js';
import { model } from './model.js';
import { keptFor } from './drafts.js';

export const link = {
  /** `again`: a connection was lost since the page was loaded. */
  delay: 250, heard: 0, again: false, failures: 0,

  build() {
    this.banner = el('div.tgw-banner', { hidden: true, role: 'status', textContent: t('Reconnecting… What you type is kept.') });
    addEventListener('online', () => this.hurry());
    document.addEventListener('visibilitychange', () => { if (!document.hidden) { this.hurry(); ahead.soon(); } });
    setInterval(() => { if (this.socket?.readyState === 1 && Date.now() - this.heard > 40000) this.socket.close(); }, 5000);
    return this.banner;
  },

  connect() {
    clearTimeout(this.timer);
    const address = new URL('chat/events', ROOT);
    address.protocol = address.protocol.replace('http', 'ws');
    const socket = new WebSocket(address);
    this.socket = socket;
    socket.onopen = () => { this.heard = Date.now(); this.delay = 250; this.up(); this.follow(); };
    socket.onmessage = (message) => { this.heard = Date.now(); this.receive(JSON.parse(message.data)); };
    socket.onclose = () => { if (this.socket === socket) this.lost(); };
  },

  up() { clearTimeout(this.warning); this.banner.hidden = true; this.failures = 0; },

  lost() {
    this.socket = null;
    this.again = true;
    if (!this.failures) this.warning = setTimeout(() => { this.banner.hidden = false; }, 1000);
    this.failures += 1;
    // A refused socket does not say why; an ordinary request does, and leads to the login if that is missing.
    if (this.failures === 3) api('GET', 'chat/session').catch(() => {});
    this.timer = setTimeout(() => this.connect(), this.delay * (0.75 + Math.random() / 2));
    this.delay = Math.min(this.delay * 2, 5000);
  },

  hurry() { if (!this.socket) { this.delay = 250; this.connect(); } },

  /** Tell the server what is shown and up to which event. */
  follow() {
    if (this.socket?.readyState !== 1) return;
    const replies = Object.fromEntries(chat.writing.map((message) => [message.data.id, message.seen]));
    const { id, seen } = composer.impersonating || {};
    if (id) replies[id] = seen;
    this.socket.send(JSON.stringify({ type: 'follow', conversation: chat.id, replies }));
  },

  receive(event) {
    const here = event.conversation === chat.id;
    if (event.reply) { if (!composer.heard(event)) chat.received(event); }
    else if (event.type === 'hello') this.hello(event);
    else if (event.type === 'model') { model.show(event.status); ahead.fresh(event.status); }
    else if (event.type === 'conversations') { event.changed?.forEach((item) => sidebar.changed(item)); event.deleted?.forEach((id) => sidebar.gone(id)); }
    else if (event.type === 'started' && here) chat.began(event.messages);
    else if (event.type === 'changed' && here) chat.reload();
    else if (event.type === 'settings' && here && event.revision !== session.revision) chat.revalue(event.revision);
  },

  /** After a break in the connection, events may be missing: everything shown is read again. */
  hello({ user }) {
    if (user !== undefined && keptFor(user)) composer.emptied();
    if (!this.again) return;
    ahead.told = ''; sidebar.load(); chat.reload();
    if (!chat.id && session.shown === null) chat.begin();  // it could not be read before
  },
};
