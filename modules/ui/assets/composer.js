// What is being typed, what is done with it, and the quiet line below.
import { TOUCH, number, icon, el, button, later, api, attempt, menu, t, toast } from './core.js';
import { session } from './session.js';
import { chat } from './chat.js';
import { link } from './link.js';
import { ahead } from './ahead.js';
import { drafts } from './drafts.js';
import { past } from './past.js';
import { queue } from './queue.js';
import { slash } from './slash.js';
import { actions } from './commands.js';
import { help } from './help.js';
import { model } from './model.js';

export { ahead };

export const composer = {
  /** While the model writes in the box: {id of that reply, number of its last event, text}. */
  impersonating: null,
  /** What goes with the message that is sent when the model has been loaded; it stays in the box until then. */
  waiting: null,

  build() {
    this.box = el('textarea', { rows: 1, placeholder: t('Write a message'), 'aria-label': t('Message'), dir: 'auto', enterKeyHint: 'send' });
    this.send = el('button.tgw-send', { type: 'submit' });
    this.more = button('bars', t('More to do'), () => menu(this.more, actions()), 'button.tgw-icon.tgw-more');
    this.later = button('clock', t('Send after this reply (Enter)'), () => this.submit(), 'button.tgw-icon.tgw-later');
    this.form = el('form.tgw-composer', { onsubmit: (e) => { e.preventDefault(); if (this.writing || this.waiting) this.stop(); else this.submit(); } },
      this.more, this.box, this.later, this.send);
    this.keep = later(250, () => this.keepNow());
    this.box.oninput = () => this.typed();
    this.box.onkeydown = (e) => {
      if (e.key !== 'ArrowUp' && e.key !== 'ArrowDown') past.leave();
      if (!slash.key(e) && this.impersonating && e.key === 'Enter') { e.preventDefault(); this.stop(); }
    };
    this.box.onblur = () => slash.close();
    this.box.onpointerdown = () => past.leave();
    addEventListener('pagehide', () => { this.keepNow(); drafts.leave(); });
    return el('div.tgw-compose', {}, slash.build(), queue.build(), this.form);
  },

  focus() { if (!TOUCH.matches) this.box.focus({ preventScroll: true }); },

  typed() {
    past.leave();
    if (this.impersonating) this.stop();  // the hand is faster than the model
    this.changed();
    this.keep();
    slash.update();
  },

  /** The box holds something else. */
  changed() {
    this.size();
    this.refresh();
    ahead.soon();
  },

  // --- drafts ------------------------------------------------------------------------------------------------------------------------

  /** Whose draft the box shows: a conversation's, null for a new one. */
  get place() { return chat.id ?? (chat.incognito ? 'incognito-' : null); },

  keepNow() {
    this.keep.cancel();
    if (this.key !== undefined && !this.impersonating) drafts.keep(this.key, this.box.value);
  },

  /** Show the draft of the conversation shown; what was typed for the former one is kept with that one. `draft`: what the server holds. */
  restore(draft) {
    const key = this.place;
    const unborn = this.key === null || this.key === 'incognito-';
    if (this.sending && !chat.busy && unborn) this.key = this.begun = key;  // the first message: what is typed on goes with the chat it began
    if (this.key !== key) this.turnTo(key);
    if (draft !== undefined && this.fresh) this.take(key, draft);
    this.size();
    this.refresh();
  },

  turnTo(key) {
    if (this.impersonating || this.waiting) this.stop();
    this.keepNow();
    slash.close();
    past.leave();
    this.key = key;
    this.fresh = true;  // the server has not said what it holds
    this.box.value = drafts.known(key);
    if (key === null) api('GET', 'chat/draft').then(({ text }) => { if (this.key === null && this.fresh) { this.take(null, text); this.changed(); } }, () => {});
  },

  take(key, draft) {
    this.fresh = false;
    if (this.box.value === drafts.known(key)) this.box.value = drafts.take(key, draft);  // else something was typed meanwhile
  },

  /** Let the box hold `text`, ready to be gone on with. */
  put(text) {
    this.box.value = text;
    this.box.setSelectionRange(text.length, text.length);
    this.box.scrollTop = this.box.scrollHeight;
    this.keepNow();
    this.changed();
    this.focus();
  },

  /** Put `text` where the caret is. */
  insert(text) {
    this.box.setRangeText(text, this.box.selectionStart, this.box.selectionEnd, 'end');
    this.keepNow();
    this.changed();
    this.focus();
  },

  /** What the box holds is somebody else's. */
  emptied() {
    this.box.value = '';
    this.key = undefined;
    this.restore();
  },

  /** Take what is typed out of the box; '' if that is only space. */
  empty() {
    const text = this.box.value;
    if (!/\S/.test(text)) return '';
    this.put('');
    return text;
  },

  // --- look --------------------------------------------------------------------------------------------------------------------------

  size() {
    const long = this.box.value.length > 20000;  // measuring it would be slow, and the answer is known
    this.box.classList.toggle('long', long);
    this.box.style.height = '';
    if (long || CSS.supports('field-sizing', 'content')) return;
    this.box.style.height = `${this.box.scrollHeight}px`;
  },

  get writing() { return Boolean(chat.running || this.impersonating); },

  refresh() {
    const stops = this.writing || this.waiting;
    const mode = stops ? 'stop' : 'send';
    if (this.send.dataset.mode !== mode) {
      this.send.dataset.mode = mode;
      this.send.title = stops ? t('Stop (Esc)') : t('Send (Enter)');
      this.send.setAttribute('aria-label', stops ? t('Stop') : t('Send'));
      this.send.replaceChildren(icon(mode));
    }
    const something = /\S/.test(this.box.value);
    this.form.setAttribute('aria-busy', String(Boolean(chat.busy)));
    this.send.disabled = !stops && (chat.busy || !(something || queue.here.length));
    this.later.hidden = !chat.running || !something;
    this.form.classList.toggle('impersonating', Boolean(this.impersonating));
    queue.refresh();
  },

  // --- sending -----------------------------------------------------------------------------------------------------------------------

  /** Send what is typed, or let it wait for the end of the reply being written. `extra` goes with it, as the number of answers. */
  async submit(extra = {}) {
    const text = this.box.value;
    if (chat.busy || this.impersonating) return;
    if (!text.trim()) { queue.held = false; queue.send(queue.here[0]); return; }
    const command = slash.impossible(text);
    if (command) {
      const literally = () => { slash.refused = true; this.submit(extra); };
      toast(t('{command} cannot be done here now.', { command }), 'error', { label: t('Send as a message'), run: literally });
      return;
    }
    if (chat.running) { if (queue.add(text)) this.put(''); return; }
    if (model.status.state === 'loading') { this.wait(extra); return; }
    const key = this.key;
    if (!await this.post(text, extra)) return;
    drafts.keep(key, '');
    if (this.box.value.startsWith(text) && (this.key === key || this.key === this.begun)) {  // what was typed meanwhile stays
      this.box.value = this.box.value.slice(text.length).trimStart();
      this.keepNow();
    }
    this.size();
    this.refresh();
  },

  wait(extra) {
    this.waiting = extra;
    this.refresh();
    model.tell();
  },

  /** The model is there, or will not come: send what waited for it, or let it stay in the box. */
  modelChanged() {
    if (!this.waiting || model.status.state === 'loading') return;
    const extra = this.waiting;
    this.waiting = null;
    this.refresh();
    if (model.status.state === 'ready') this.submit(extra);
  },

  /** Whether the server took the message. */
  async post(text, extra = {}) {
    const incognito = Boolean(chat.incognito);
    this.sending = true;
    this.begun = undefined;
    const sent = await chat.turn('chat/messages', { text, ...(incognito && !chat.id ? { incognito } : {}), ...extra });
    this.sending = false;
    if (sent && !incognito) past.add(text);
    return sent;
  },

  /** Show an older (1) or newer (-1) message of one's own. */
  walk(step) {
    const text = past.walk(step, this.box.value);
    this.box.value = text;
    this.box.setSelectionRange(text.length, text.length);
    this.changed();
  },

  /** End what is being written: the user's next message, or the reply; or do not send what waits for the model. */
  stop() {
    if (this.waiting) {
      this.waiting = null;
      this.refresh();
      model.tell();
      return;
    }
    if (!this.impersonating) { chat.stop(); return; }
    const { id } = this.impersonating;
    this.impersonating = null;
    if (id) attempt(() => api('POST', 'chat/stop', { message: id }));
    this.keepNow();
    this.changed();
  },

  // --- the model writes the user's message -------------------------------------------------------------------------------------------

  async impersonate() {
    if (chat.busy || this.writing) return;
    const mine = this.impersonating = { id: null, seen: 0, text: '' };
    this.refresh();
    await chat.opening;
    const begun = await attempt(() => session.turn('chat/impersonate', { conversation: chat.id, text: this.box.value }));
    if (this.impersonating !== mine) { if (begun) api('POST', 'chat/stop', { message: begun.reply }).catch(() => {}); return; }
    if (!begun) { this.stop(); return; }
    mine.id = begun.reply;
    link.follow();
  },

  /** An event of what the model writes in the box. True if it was one. */
  heard(event) {
    const mine = this.impersonating;
    if (!mine || event.reply !== mine.id) return false;
    if (event.event <= mine.seen && event.type !== 'end') return true;
    mine.seen = event.event;
    mine.text = event.type === 'update' ? mine.text + event.text : event.text ?? mine.text;
    if (mine.text) this.box.value = mine.text;
    this.box.scrollTop = this.box.scrollHeight;
    if (event.type === 'end') {
      this.impersonating = null;
      this.keepNow();
      if (event.error) toast(event.error);
    }
    this.changed();
    return true;
  },
};

/** The quiet line under the composer. */
export const live = {
  build() {
    this.text = el('span');
    this.context = el('span.tgw-context', { hidden: true }, el('span'), el('meter', { min: 0, max: 1, high: 0.9, 'aria-label': t('Context used') }));
    this.model = el('span.tgw-needs');
    this.help = el('button.tgw-help', { type: 'button', textContent: '?', title: t('Keys and commands (Ctrl+/)'), 'aria-label': t('Keys and commands'), onclick: () => help() });
    this.el = el('div.tgw-live', {}, this.model, this.text, this.context, this.help);
    return this.el;
  },

  /** Figures of a reply; `event`: what is told beside them while it is being written. */
  show(stats, { queue: before = null, prefill = null, note = null } = {}) {
    const s = stats || {};
    const waits = before !== null && (before ? t('Waiting: {count} before this', { count: number.format(before) }) : t('Waiting: this is next'));
    const reads = prefill && t('Reading prompt: {percent} %', { percent: Math.floor((100 * prefill[0]) / prefill[1]) });
    const speed = s.tokens_per_second && t('{speed} tokens/s', { speed: number.format(s.tokens_per_second, 1) });
    const prompt = s.prompt_tokens && t('{count} prompt tokens', { count: number.format(s.prompt_tokens) });
    this.text.textContent = [note, waits, !waits && reads, speed, prompt].filter(Boolean).join(' · ');
    const known = Boolean(s.context_length && s.context_used);
    this.context.hidden = !known;
    if (!known) return;
    const used = Math.min(s.context_used, s.context_length);  // the last token of a full context is told, but not computed
    this.context.firstChild.textContent = t('context {used} / {length}', { used: number.format(used), length: number.format(s.context_length) });
    this.context.lastChild.value = used / s.context_length;
  },
};
