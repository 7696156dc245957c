// The conversation shown.
import { TITLE, icon, el, button, near, api, toasts, attempt, copyFrom } from './core.js';
import { session } from './session.js';
import { Message } from './message.js';
import { sidebar } from './sidebar.js';
import { composer, ahead, live } from './composer.js';
import { link } from './link.js';
import { setConversation } from './main.js';

const PAGE = 40;  // messages that the server gives at once
const MOST = 3 * PAGE;

export const chat = {
  id: null, views: new Map(), earlier: false, stuck: true, loading: 0, busy: false,

  build() {
    this.heading = el('strong', { dir: 'auto' });
    this.top = el('div.tgw-edge');
    this.bottom = el('div.tgw-edge');
    this.box = el('div.tgw-messages');
    this.welcome = el('div.tgw-welcome', {}, icon('chat'), el('h2', { textContent: 'What shall we talk about?' }), el('p'));
    this.scroller = el('div.tgw-scroll', { tabIndex: -1, role: 'region', 'aria-label': 'Messages' }, this.welcome, this.top, this.box, this.bottom);
    this.jump = button('down', 'Jump to latest', () => this.toBottom(), 'button.tgw-jump');
    this.announce = el('div.tgw-sr', { role: 'status', 'aria-live': 'polite' });
    this.scroller.addEventListener('scroll', () => this.scrolled(), { passive: true });
    this.scroller.addEventListener('click', (e) => {
      const control = e.target.closest('[data-copy]');
      if (control) copyFrom(control, control.closest('.tgw-code').querySelector('code').textContent);
    });
    near(this.bottom, this.scroller, '0px 0px 48px', () => { this.stick(true); this.trim(); });
    this.beginning = near(this.top, this.scroller, '600px 0px 0px', () => this.older());
    // After layout and before painting: the end of the reply stays in sight while it grows, and when the composer or a keyboard takes room.
    const grown = new ResizeObserver(() => this.follow());
    grown.observe(this.scroller);
    grown.observe(this.box);
    return [this.scroller, this.announce];
  },

  get running() { const last = this.last(); return last?.running ? last : null; },
  last() { return this.views.get(this.box.lastChild?.dataset.id); },
  lastOf(role) {
    for (let at = this.box.lastChild; at; at = at.previousSibling) {
      const view = this.views.get(at.dataset.id);
      if (view.data.role === role) return view;
    }
    return null;
  },

  // Scrolling up lets go of the bottom, reaching it takes hold again. A reply that grows or shrinks (a table that is drawn again) is not scrolling.
  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    if (scrollTop < this.lastTop - 2 && scrollHeight - scrollTop - clientHeight > 48) this.stick(false);
    this.lastTop = scrollTop;
  },
  stick(stuck) { this.stuck = stuck; this.jump.hidden = stuck; },
  toBottom() { this.stick(true); this.follow(); },

  /** At the bottom, let go of messages far above: even what is not painted costs the browser time in every frame. They load again on scroll. */
  trim() {
    if (!this.stuck || this.box.childElementCount <= MOST) return;
    while (this.box.childElementCount > MOST - PAGE && !this.box.firstChild.classList.contains('editing')) {
      this.views.delete(this.box.firstChild.dataset.id);
      this.box.firstChild.remove();
      this.earlier = true;
    }
  },
  follow() {
    if (!this.stuck) return;
    this.scroller.scrollTop = 1e9;
    this.lastTop = this.scroller.scrollTop;
  },

  async open(id) {
    const ticket = ++this.loading;
    this.forget();
    this.id = id;
    toasts.textContent = '';
    composer.restore();
    sidebar.mark(id);
    if (id) {
      const page = await attempt(() => api('GET', `chat/conversations/${encodeURIComponent(id)}`).catch((error) => {
        if (error.status === 404) setConversation(null, true);
        throw error;
      }));
      if (ticket !== this.loading) return;
      if (page) this.show(page);
    }
    link.follow();
    this.changed();
  },

  /** Read the conversation again, e.g. after the connection was away. */
  async reload() {
    const ticket = this.loading;
    const page = this.id && await attempt(() => api('GET', `chat/conversations/${encodeURIComponent(this.id)}`));
    if (!page || ticket !== this.loading) return;
    this.show(page);
    link.follow();
  },

  forget() {
    this.views.clear();
    this.box.textContent = '';
    this.earlier = false;
    this.retitle('');
    this.stick(true);
  },

  /** Show the newest page of a branch; messages already there stay, and so do older ones above them. */
  show(page) {
    const first = page.messages.find((view) => this.views.has(view.id));
    if (!first) this.forget();
    else this.cut(this.views.get(first.id), new Set(page.messages.map((view) => view.id)));
    if (!first) this.earlier = page.earlier;
    for (const view of page.messages) this.put(view);
    this.retitle(page.title);
    this.changed();
    this.beginning.again();
  },

  put(view) {
    const shown = this.views.get(view.id);
    if (shown) { shown.refresh(view); this.box.append(shown.el); return; }
    const made = new Message(view, this);
    this.views.set(view.id, made);
    this.box.append(made.el);
  },

  /** Remove `from` and everything below it, but what is in `keep`. */
  cut(from, keep = new Set()) {
    for (let at = from.el; at;) {
      const next = at.nextSibling;
      if (!keep.has(at.dataset.id)) { this.views.delete(at.dataset.id); at.remove(); }
      at = next;
    }
  },

  async older() {
    const first = this.box.firstChild;
    if (!this.earlier || !first || this.fetching) return;
    this.fetching = true;
    const ticket = this.loading;
    const page = await attempt(() => api('GET', `chat/conversations/${encodeURIComponent(this.id)}?before=${encodeURIComponent(first.dataset.id)}`));
    this.fetching = false;
    if (!page || ticket !== this.loading || first !== this.box.firstChild) return;
    this.earlier = page.earlier;
    const made = page.messages.map((view) => new Message(view, this));
    made.forEach((message) => this.views.set(message.data.id, message));
    // The reader's place is kept by hand, because not every browser anchors it.
    this.scroller.style.overflowAnchor = 'none';
    const below = this.scroller.scrollHeight - this.scroller.scrollTop;
    this.box.prepend(...made.map((message) => message.el));
    this.lastTop = this.scroller.scrollTop = this.scroller.scrollHeight - below;
    requestAnimationFrame(() => { this.scroller.style.overflowAnchor = ''; });
    this.beginning.again();
  },

  /** A turn began, here or in another tab: its messages replace the versions of themselves that are shown. */
  began(messages, since = Infinity) {
    for (const view of messages) {
      const shown = this.views.get(view.id);
      if (shown) {
        if (!shown.running && shown.ended < since) shown.refresh(view);  // it may have ended already
        continue;
      }
      const former = (view.versions || []).map((id) => this.views.get(id)).find(Boolean);
      if (former) this.cut(former);
      this.put(view);
    }
    this.trim();
    this.changed();
  },

  /** Post something that begins a turn, and show its messages. True if the server took it. */
  async turn(path, body) {
    if (this.busy || this.running) return false;
    this.busy = true;
    composer.refresh();
    const [ticket, since] = [this.loading, performance.now()];
    const started = await attempt(() => session.turn(path, { conversation: this.id, ...body }));
    this.busy = false;
    composer.refresh();
    if (!started) return false;
    toasts.textContent = '';
    if (ticket === this.loading) this.adopt(started, since);
    return true;
  },

  adopt(started, since) {
    if (started.conversation) {
      if (!this.id) {
        this.id = started.conversation.id;
        history.replaceState(null, '', `#c=${encodeURIComponent(this.id)}`);
        composer.restore();
      }
      this.retitle(started.conversation.title);
      sidebar.changed({ updated: Date.now() / 1000, running: started.messages.some((view) => view.state === 'running'), ...started.conversation });
      sidebar.mark(this.id);
    }
    this.began(started.messages, since);
    this.toBottom();
    link.follow();
  },

  regenerate(message) { return this.turn('chat/regenerate', { message: message.data.id }); },
  continue(message) { return this.turn('chat/continue', { message: message.data.id }); },
  edit(message, text) { return this.turn('chat/edit', { message: message.data.id, text }); },
  stop() { const reply = this.running; if (reply) attempt(() => api('POST', 'chat/stop', { message: reply.data.id })); },
  async select(version) {
    if (!version || this.running) return;
    const page = await attempt(() => api('POST', 'chat/select', { conversation: this.id, message: version }));
    if (!page || page.id !== this.id) return;
    const old = (page.messages.find((view) => view.id === version)?.versions || []).map((id) => this.views.get(id)).find(Boolean);
    if (old) this.cut(old);
    this.show(page);
  },

  retitle(title) {
    document.title = title || TITLE;
    this.heading.textContent = title || 'New chat';
  },

  /** Called when messages were added, removed or ended, never for an update. */
  changed() {
    this.welcome.hidden = this.box.childElementCount > 0 || Boolean(this.id);
    composer.refresh();
    ahead.soon();
    live.show(this.lastOf('assistant')?.data.stats);
  },

  received(event) {
    const message = this.views.get(event.reply);
    if (!message?.running || (event.event <= message.seen && event.type !== 'end')) return;
    message.seen = event.event;
    if (event.type === 'update') message.update(event);
    if (event.type === 'snapshot') message.snapshot(event);
    if (event.type === 'end') {
      message.end(event.message);
      this.announce.textContent = event.message.text.slice(0, 2000);
      this.changed();
    } else if (event.stats) {
      live.show(event.stats);
    }
  },
};
