// The conversation shown.
import { icon, el, button, near, api, toasts, toast, attempt, copyFrom, t } from './core.js';
import { session } from './session.js';
import { Message } from './message.js';
import { Columns } from './columns.js';
import { SummaryCard } from './summary.js';
import { sidebar } from './sidebar.js';
import { composer, ahead, live } from './composer.js';
import { head } from './head.js';
import { alerts } from './alerts.js';
import { link } from './link.js';
import { setConversation } from './main.js';

const PAGE = 40;  // messages that the server gives at once
const MOST = 3 * PAGE;
const READS = 5;  // of a conversation that changes while it is read

const path = (id) => `chat/conversations/${encodeURIComponent(id)}`;

export const chat = {
  /** `views`: the messages shown, by id. `moves`: how often what is shown is known to have changed. `columns`: replies side by side at the end. */
  id: null, incognito: false, views: new Map(), columns: null, summary: null, earlier: false, stuck: true, loading: 0, moves: 0, busy: false,

  build() {
    this.top = el('div.tgw-edge');
    this.bottom = el('div.tgw-edge');
    this.box = el('div.tgw-messages');
    this.card = new SummaryCard(this);
    this.welcome = el('div.tgw-welcome', {}, icon('chat'), el('h2', { textContent: t('What shall we talk about?') }), el('p'));
    this.scroller = el('div.tgw-scroll', { tabIndex: -1, role: 'region', 'aria-label': t('Messages') }, this.welcome, this.top, this.box, this.bottom);
    this.jump = button('down', t('Jump to latest'), () => this.toBottom(), 'button.tgw-jump');
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

  /** The values in effect here. */
  get values() { return session.values; },

  // --- what is shown -------------------------------------------------------------------------------------------------------------------

  /** All that are being written; only the end of a conversation can be. */
  get writing() { return (this.columns ? this.columns.messages : [this.last()]).filter((message) => message?.running); },
  get running() { return this.writing[0] || null; },

  /** The last message of the branch. */
  last() { return this.columns ? this.columns.tip : this.views.get(this.box.lastElementChild?.dataset.id); },
  lastOf(role) {
    for (let at = this.box.lastElementChild; at; at = at.previousElementSibling) {
      const view = at === this.columns?.el ? this.columns.tip : this.views.get(at.dataset.id);
      if (view?.data.role === role) return view;
    }
    return null;
  },
  first() { return this.box.querySelector('[data-id]'); },

  // --- scrolling -----------------------------------------------------------------------------------------------------------------------

  // Scrolling up lets go of the bottom, reaching it takes hold again. A reply that grows or shrinks (a table that is drawn again) is not scrolling.
  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    if (scrollTop < this.lastTop - 2 && scrollHeight - scrollTop - clientHeight > 48) this.stick(false);
    this.lastTop = scrollTop;
  },
  stick(stuck) { this.stuck = stuck; this.jump.hidden = stuck; },
  toBottom() { this.stick(true); this.follow(); },
  follow() {
    if (!this.stuck) return;
    this.scroller.scrollTop = 1e9;
    this.lastTop = this.scroller.scrollTop;
  },

  /** At the bottom, let go of messages far above: even what is not painted costs the browser time in every frame. They load again on scroll. */
  trim() {
    if (!this.stuck || this.box.childElementCount <= MOST) return;
    while (this.box.childElementCount > MOST - PAGE && !this.box.firstElementChild.classList.contains('editing')) {
      this.drop(this.box.firstElementChild);
      this.earlier = true;
    }
  },

  // --- opening and reading -------------------------------------------------------------------------------------------------------------

  open(id) {
    this.opening = this.openNow(id);
    return this.opening;
  },

  async openNow(id) {
    const ticket = ++this.loading;
    this.id = id;
    this.incognito = id ? id.startsWith('incognito-') : Boolean(this.startIncognito);
    this.startIncognito = false;
    this.clear();
    this.retitle('');
    clearErrors();
    composer.restore();
    sidebar.mark(id);
    await (id ? this.reload() : this.begin());
    if (ticket !== this.loading) return;
    link.follow();
    this.changed();
  },

  /** The newest page of the conversation. One that is not there (any more) is left. */
  read() {
    const { id } = this;
    return api('GET', path(id)).catch((error) => {
      if (id !== this.id) return null;  // nobody waits for it any more
      if (error.status === 404) setConversation(null, true);
      throw error;
    });
  },

  /** Read the conversation again: it changed elsewhere, or the connection was away. What changes while it is read is read too. */
  async reload() {
    this.moves += 1;
    const ticket = this.loading;
    if (!this.id || this.reading === ticket) return;
    this.reading = ticket;
    let page, moves;
    for (let reads = 0; reads < READS && moves !== this.moves; reads += 1) {
      moves = this.moves;
      page = await attempt(() => this.read());
      if (!page || ticket !== this.loading) break;
    }
    if (this.reading === ticket) this.reading = null;
    if (!page || ticket !== this.loading) return;
    this.show(page);
    link.follow();
  },

  clear() {
    for (const view of this.views.values()) view.rescue();
    this.views.clear();
    this.columns = this.summary = this.choosing = this.comparing = null;
    this.empty = false;
    this.box.textContent = '';
    this.earlier = false;
    this.stick(true);
  },

  /** A chat that is not there yet: its values are this browser's, and its character may speak first. */
  async begin() {
    const ticket = this.loading;
    const found = await attempt(() => api('GET', 'chat/session'));
    if (!found || ticket !== this.loading) return;
    session.adopt(null, found.revision, found.values);
    this.greet(found.greeting);
  },

  /** Show the greeting that a new chat would begin with. */
  greet(view = greetingOf(this.values)) {
    if (this.id) return;
    this.box.textContent = '';
    if (view) {
      const made = new Message({ ...view, id: '' }, this);
      made.el.removeAttribute('data-id');
      this.box.append(made.el);
    }
    this.changed();
  },

  /** The values in effect changed, here or elsewhere. `revision`: what they are now at the server, where that is known. */
  async revalue(revision) {
    const ticket = this.loading;
    await session.flush();
    if (ticket !== this.loading || revision === session.revision) return;
    const found = await attempt(() => api('GET', session.path(this.id)));
    if (found && ticket === this.loading) session.adopt(this.id, found.revision, found.values);
  },

  /** Show the newest page of a branch; messages already there stay, and so do older ones above them. */
  show(page) {
    const last = page.messages.at(-1);
    const group = last && this.together(last, page.beside || []);
    if (this.columns && !(group && sameIds(this.columns.ids, group.map((view) => view.id)))) this.settle();
    const known = page.messages.find((view) => this.views.has(view.id));
    if (!known) this.clear();
    else this.cut(this.views.get(known.id), new Set([...page.messages, ...(group || [])].map((view) => view.id)));
    if (!known || known !== page.messages[0]) this.earlier = page.earlier;
    this.empty = !last;
    this.arrange(page.messages, group);
    this.summary = page.summary;
    this.placeSummary();
    session.adopt(page.id, page.revision, page.values);
    composer.restore(page.draft);
    this.retitle(page.title);
    this.changed();
    this.beginning.again();
  },

  /** The views of what stands side by side at the end, in their order; null when the last message stands alone. */
  together(last, beside) {
    if (!beside.length) return !this.columns?.group && this.columns?.ids.includes(last.id) ? this.columns.messages.map((message) => (message.data.id === last.id ? last : message.data)) : null;
    const order = (view) => last.versions.indexOf(view.id);
    return [last, ...beside].sort((a, b) => order(a) - order(b));
  },

  /** Put messages in their order at the end of what is shown. What stands right is not moved: focus and selection stay. */
  arrange(messages, group) {
    let below = null;
    for (const view of messages.toReversed()) {
      const place = group && below === null ? this.align(group, view) : this.have(view).el;
      const next = place.nextSibling === this.card.el ? this.card.el.nextSibling : place.nextSibling;
      if (place.parentNode !== this.box || next !== below) this.box.insertBefore(place, below);
      below = place;
    }
  },

  /** The row of a group, of which `last` is on the branch shown. */
  align(group, last) {
    const columns = this.columns || new Columns(this, last.group);
    this.columns = columns;
    for (const view of group) {
      const message = view.blocks ? this.have(view) : this.views.get(view.id);
      if (!columns.holds(message)) columns.add(message);
    }
    columns.mark(last.id);
    return columns.el;
  },

  /** The message of a view, made or renewed. */
  have(view) {
    const shown = this.views.get(view.id);
    if (shown) { shown.refresh(view); return shown; }
    const made = new Message(view, this);
    this.views.set(view.id, made);
    return made;
  },

  /** Remove `from` and everything below it, but what is in `keep`. */
  cut(from, keep = new Set()) { this.sweep(from.place, keep); },
  cutBelow(message) { this.sweep(message.place.nextSibling); },
  sweep(at, keep = new Set()) {
    while (at) {
      const next = at.nextSibling;
      if (!idsIn(at).some((id) => keep.has(id))) this.drop(at);
      at = next;
    }
  },

  /** Take an element out, and forget the messages in it. */
  drop(element) {
    for (const id of idsIn(element)) { this.views.get(id)?.rescue(); this.views.delete(id); }
    if (element === this.columns?.el) this.columns = this.choosing = null;
    element.remove();
  },

  /** Replies side by side stand below each other again; of them only `kept` stays, if it is given. */
  settle(kept) {
    const { columns } = this;
    const messages = columns.messages;
    columns.dissolve();
    this.columns = this.choosing = null;
    for (const message of messages) if (kept && message !== kept) this.drop(message.el);
  },

  /** The summary stands above the first message that is still sent itself. */
  placeSummary() {
    const { text, after } = this.summary || {};
    const below = text && [...this.views.values()].find((message) => message.data.parent === after);
    if (!below) { this.card.el.remove(); return; }
    this.card.show(text);
    if (below.place.previousSibling !== this.card.el) below.place.before(this.card.el);
  },

  /** Show older messages; true when there were some. */
  older() {
    this.fetching ??= this.readOlder().finally(() => { this.fetching = null; });
    return this.fetching;
  },

  async readOlder() {
    const first = this.first();
    if (!this.earlier || !first) return false;
    const ticket = this.loading;
    const page = await attempt(() => api('GET', `${path(this.id)}?before=${encodeURIComponent(first.dataset.id)}`));
    if (!page || ticket !== this.loading || first !== this.first()) return false;
    this.earlier = page.earlier;
    const made = page.messages.map((view) => this.have(view));
    // The reader's place is kept by hand, because not every browser anchors it.
    this.scroller.style.overflowAnchor = 'none';
    const below = this.scroller.scrollHeight - this.scroller.scrollTop;
    this.box.prepend(...made.map((message) => message.el));
    this.placeSummary();
    this.lastTop = this.scroller.scrollTop = this.scroller.scrollHeight - below;
    requestAnimationFrame(() => { this.scroller.style.overflowAnchor = ''; });
    this.beginning.again();
    return made.length > 0;
  },

  // --- turns ---------------------------------------------------------------------------------------------------------------------------

  /** A turn began, here or in another tab: its messages replace the versions of themselves that are shown, and what stood below. */
  began(messages, since = Infinity) {
    this.moves += 1;
    for (const view of messages) {
      const shown = this.views.get(view.id);
      if (!shown) {
        if (!this.grow(view)) { this.reload(); break; }
      } else if (!shown.running && shown.ended < since) {  // else it may have ended already
        if (view.state === 'running') this.cutBelow(shown);
        shown.refresh(view);
      }
    }
    this.columns?.refresh();
    this.placeSummary();
    this.trim();
    this.changed();
  },

  /** Add a new message at its place. False when what is shown has no place for it. */
  grow(view) {
    if (view.group && view.group === this.columns?.group) { this.columns.add(this.have(view)); return true; }
    const former = (view.versions || []).map((id) => this.views.get(id)).find(Boolean);
    const above = this.views.get(view.parent);
    const compared = former && former === this.views.get(this.comparing) ? former : null;
    if (compared) this.cutBelow(compared);
    else if (former) this.cut(former);
    else if (above) { if (this.columns) this.settle(above); this.cutBelow(above); }
    else if (view.parent || this.first()) return false;
    const made = this.have(view);
    if (compared || view.group) this.sideBySide(view.group, [compared, made]);
    else this.box.append(made.el);
    return true;
  },

  sideBySide(group, messages) {
    this.columns = new Columns(this, group);
    this.comparing = null;
    this.box.append(this.columns.el);
    for (const message of messages) if (message) this.columns.add(message);
    this.columns.mark(messages.at(-1).data.id);
  },

  /** Post something that begins a turn, and show its messages. True if the server took it. */
  async turn(action, body) {
    if (this.busy || !this.quiet()) return false;
    this.busy = true;
    composer.refresh();
    await this.opening;
    const [ticket, since] = [this.loading, performance.now()];
    const started = await attempt(() => session.turn(action, { conversation: this.id, ...body }));
    this.busy = false;
    composer.refresh();
    if (!started) return false;
    clearErrors();
    if (ticket === this.loading) this.adopt(started, since);
    return true;
  },

  /** True when nothing is being written here; else that is told. */
  quiet() {
    if (this.running) toast(t('A reply is being written. Stop it, or wait for its end.'));
    return !this.running;
  },

  adopt({ conversation, messages }, since) {
    if (!this.id) this.born(conversation.id);
    this.retitle(conversation.title);
    sidebar.changed({ updated: Date.now() / 1000, running: messages.some((view) => view.state === 'running'), ...conversation });
    sidebar.mark(this.id);
    this.began(messages, since);
    this.toBottom();
    link.follow();
  },

  /** The new chat is there now, with the values that it was begun with. */
  born(id) {
    this.id = id;
    this.box.textContent = '';  // the greeting is a message now
    session.adopt(id, session.revision, session.values);
    history.replaceState(null, '', `#c=${encodeURIComponent(id)}`);
    composer.restore();
  },

  regenerate(message, extra = {}) { return this.turn('chat/regenerate', { message: message.data.id, ...extra }); },
  continue(message) { return this.turn('chat/continue', { message: message.data.id }); },
  edit(message, text, answer = true) { return this.turn('chat/edit', { message: message.data.id, text, answer }); },
  insert(role, text) { return this.turn('chat/insert', { role, text }); },

  /** Answer again in another way; the former answer stays beside the new one until one of them is chosen. */
  async again(message, extra) {
    this.comparing = message.data.id;
    if (!await this.regenerate(message, extra)) this.comparing = null;
  },

  /** Stop a reply, or all that are being written here. */
  stop(message) {
    const stopped = message ? [message] : this.writing;
    return Promise.all(stopped.map((each) => attempt(() => api('POST', 'chat/stop', { message: each.data.id }))));
  },

  // --- other changes -------------------------------------------------------------------------------------------------------------------

  /** Do what answers a page of the conversation, and show that. Answers the page. */
  async changing(action) {
    const [ticket, moves] = [this.loading, ++this.moves];
    const page = await attempt(action);
    if (!page || ticket !== this.loading) return null;
    this.show(page);
    if (moves !== this.moves) this.reload();
    return page;
  },

  /** Show the branch of a version. Answers its page. */
  async select(version) {
    if (!version || this.running) return null;
    const arrows = document.activeElement?.closest('.tgw-versions');
    const pressed = document.activeElement?.title;
    const page = await this.changing(() => api('POST', 'chat/select', { conversation: this.id, message: version }));
    const buttons = arrows ? [...(this.views.get(version)?.el.querySelectorAll('.tgw-versions button:enabled') || [])] : [];
    (buttons.find((each) => each.title === pressed) || buttons[0])?.focus({ preventScroll: true });
    return page;
  },

  /** Take one of the replies side by side. What is still being written is stopped first. */
  async choose(message) {
    const others = this.writing.filter((each) => each !== message);
    this.choosing = message.data.id;
    if (others.length) { others.forEach((each) => this.stop(each)); return; }
    this.choosing = null;
    if (this.columns) this.columns.group ||= 'chosen';
    if (await this.changing(() => api('POST', 'chat/choose', { conversation: this.id, message: message.data.id }))) composer.focus();
  },

  pin(message, pinned) {
    return attempt(async () => {
      await api('POST', 'chat/pin', { conversation: this.id, message: message.data.id, pinned });
      message.data.pinned = pinned;
      message.decorate();
    });
  },

  /** Take a message out, with all that follows it. Answers whether the server did. `undone` is called before it comes back. */
  async remove(message, undone) {
    if (!this.quiet()) return false;
    const { id } = this;
    let undo = null;
    const page = await this.changing(async () => {
      const answer = await api('POST', 'chat/remove', { conversation: id, message: message.data.id });
      undo = answer.undo;
      return answer.page;
    });
    if (!page) return false;
    const back = { label: t('Undo'), run: () => { undone?.(); this.restore(undo, id); } };
    toast(t('Removed, with what followed.'), 'done', this.incognito ? null : back);
    return true;
  },

  async restore(undo, id) {
    if (await attempt(() => api('POST', 'chat/undo', { undo: [undo] })) && id === this.id) this.reload();
  },

  /** Remove the last message of the user with what follows; its text is in the box again. */
  async removeLast() {
    const message = this.lastOf('user') || this.last();
    const { text } = message?.data || {};
    const putBack = () => { if (composer.box.value === text) composer.put(''); };
    if (!message || !await this.remove(message, putBack)) return;
    if (message.mine && !composer.box.value) composer.put(text);
  },

  /** A new chat with everything up to a message, and show it. */
  async branch(message) {
    const made = await attempt(() => api('POST', 'chat/branch', { conversation: this.id, message: message.data.id }));
    if (made) setConversation(made.id);
  },

  /** Show message `first` of the branch that `last` is on; `shown`: it is the branch shown. True if it is there. */
  async goTo(first, last, shown) {
    if (!shown && (!this.quiet() || !await this.select(last))) return false;
    while (!this.views.has(first) && this.earlier && await this.older()) { /* further up */ }
    if (!this.views.has(first)) return false;
    this.stick(false);
    this.views.get(first).reveal();
    return true;
  },

  /** Show a message of the conversation that is being opened, on whatever branch it is. */
  async find(message) {
    await this.opening;
    const ticket = this.loading;
    if (!await this.goTo(message, message, true) && ticket === this.loading) this.goTo(message, message, false);
  },

  retitle(title) { head.retitle(title); },

  /** Called when messages were added, removed or ended, never for an update. */
  changed() {
    this.welcome.hidden = this.box.childElementCount > 0 || Boolean(this.id && !this.empty);
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
    if (event.type === 'end') this.ended(message, event.message);
    else if (event.stats) live.show(event.stats, event);
  },

  ended(message, view) {
    message.end(view);
    this.announce.textContent = view.text.slice(0, 2000);
    this.columns?.refresh();
    this.changed();
    alerts.finished(message);
    const chosen = !this.running && this.views.get(this.choosing);
    if (chosen) this.choose(chosen);
  },
};

/** What was done has worked: what was said against it before is out of date. */
function clearErrors() { toasts.querySelectorAll('.error').forEach((each) => each.remove()); }

function idsIn(element) { return element.dataset.id ? [element.dataset.id] : [...element.querySelectorAll('[data-id]')].map((each) => each.dataset.id); }

function sameIds(some, others) { return some.length === others.length && others.every((id) => some.includes(id)); }

/** The greeting of a chat with these values, as it was typed: where the server does not tell what it makes of it. */
function greetingOf({ mode, greeting, name1, name2 }) {
  if (!mode || mode === 'instruct' || !greeting?.trim()) return null;
  const names = { char: name2, bot: name2, user: name1 };
  const text = greeting.replace(/\{\{\s*(char|user)\s*\}\}|<(BOT|USER)>/gi, (_, one, other) => names[(one || other).toLowerCase()]);
  const blocks = [el('div.tgw-plain', { textContent: text }).outerHTML];
  return { id: '', parent: null, role: 'assistant', name: name2, blocks, text, state: 'done', greeting: true, versions: [] };
}
