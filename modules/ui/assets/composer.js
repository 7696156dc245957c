// What is being typed, what is read before it is sent, and the quiet line below.
import { TOUCH, number, icon, el, later, api, memory } from './core.js';
import { session } from './session.js';
import { chat } from './chat.js';
import { model } from './model.js';

/** Unsent text, kept for the newest conversations so that neither a reload nor a crash takes it. */
const drafts = {
  key: (id) => `tgw.draft:${id || 'new'}`,
  read(id) { return memory.get(this.key(id)) || ''; },
  write(id, text) {
    const key = this.key(id);
    let known = [];
    try { known = JSON.parse(memory.get('tgw.drafts') || '[]').filter((each) => each !== key); } catch { /* begin anew */ }
    if (text) known.unshift(key);
    known.splice(20).forEach((old) => memory.set(old, ''));
    while (!memory.set(key, text) && known.length > 1) memory.set(known.pop(), '');
    memory.set('tgw.drafts', JSON.stringify(known));
  },
};

export const composer = {
  build() {
    this.box = el('textarea', { rows: 1, placeholder: 'Write a message', 'aria-label': 'Message', dir: 'auto', enterKeyHint: 'send' });
    this.send = el('button.tgw-send', { type: 'submit' });
    this.form = el('form.tgw-composer', { onsubmit: (e) => { e.preventDefault(); if (chat.running) chat.stop(); else this.submit(); } }, this.box, this.send);
    this.keep = later(250, () => drafts.write(this.key, this.box.value));
    this.box.oninput = () => { this.size(); this.keep(); this.refresh(); ahead.soon(); };
    this.box.onkeydown = (e) => this.keys(e);
    window.addEventListener('pagehide', () => drafts.write(this.key, this.box.value));
    return this.form;
  },

  focus() { if (!TOUCH.matches) this.box.focus({ preventScroll: true }); },

  /** Show the draft of the conversation shown; what was typed for the former one is kept with that one. */
  restore() {
    if (this.sending && this.key === null) this.key = chat.id;  // the first message: what is typed on goes with the chat it began
    if (this.key !== undefined && this.key !== chat.id) { this.keep.cancel(); drafts.write(this.key, this.box.value); }
    if (this.key !== chat.id || this.key === undefined) { this.key = chat.id; this.box.value = drafts.read(chat.id); }
    this.size();
    this.refresh();
  },

  size() {
    const long = this.box.value.length > 20000;  // measuring it would be slow, and the answer is known
    this.box.classList.toggle('long', long);
    this.box.style.height = '';
    if (long || CSS.supports('field-sizing', 'content')) return;
    this.box.style.height = `${this.box.scrollHeight}px`;
  },

  refresh() {
    const running = Boolean(chat.running);
    const mode = running ? 'stop' : 'send';
    if (this.send.dataset.mode !== mode) {
      this.send.dataset.mode = mode;
      this.send.title = running ? 'Stop (Esc)' : 'Send (Enter)';
      this.send.setAttribute('aria-label', running ? 'Stop' : 'Send');
      this.send.replaceChildren(icon(mode));
    }
    this.send.disabled = !running && (chat.busy || !/\S/.test(this.box.value));
  },

  async submit() {
    const text = this.box.value;
    if (!text.trim() || chat.busy || chat.running) return;
    const key = this.key;
    this.sending = true;
    const sent = await chat.turn('chat/messages', { text });
    this.sending = false;
    if (!sent) return;
    drafts.write(key, '');
    if (this.box.value.startsWith(text) && (this.key === key || key === null)) {  // what was typed meanwhile stays
      this.box.value = this.box.value.slice(text.length).trimStart();
      this.keep.cancel();
      drafts.write(this.key, this.box.value);
    }
    this.size();
    this.refresh();
  },

  keys(e) {
    if (e.isComposing || e.keyCode === 229) return;  // an input method is choosing characters
    if (e.key === 'Enter' && !e.shiftKey && !e.ctrlKey && !e.altKey && !e.metaKey && !TOUCH.matches) { e.preventDefault(); this.submit(); }
    if (e.key === 'ArrowUp' && !this.box.value) { const own = chat.lastOf('user'); if (own && !chat.running) { e.preventDefault(); own.edit(); } }
  },
};

/** What is typed, and the chat that is opened, told to the server, so that the model has read them before Send. Whether that works is no matter. */
export const ahead = {
  soon: later(300, () => ahead.tell()),

  /** Another model has read nothing yet, and may be able to do this when the former was not. */
  fresh({ state, name }) {
    if (state !== 'ready' || name !== this.model) { this.model = name; this.useless = false; this.told = ''; }
    this.soon();
  },

  draft() {
    const text = composer.box.value;
    const [least, most] = [3, 400000];  // less is not worth a request, more fits no context
    return { conversation: chat.id, text: text.trim().length < least || text.length > most ? '' : text, revision: session.revision };
  },

  async tell() {
    const last = chat.last()?.data;
    const idle = !this.telling && !this.useless && !document.hidden && !chat.busy && !chat.running;
    if (!idle || model.status.state !== 'ready' || (chat.id && !last)) return;
    const draft = this.draft();
    const told = JSON.stringify([draft, last?.id, last?.text.length]);
    if (told === this.told) return;
    this.told = told;
    this.telling = true;
    try {
      const answer = await api('POST', 'chat/ahead', draft, AbortSignal.timeout(10000));
      if (told === this.told) this.useless = !answer.ahead;  // else it is about a former model
    } catch { /* Send will say what is wrong */ }
    this.telling = false;
    this.soon();  // there may be more by now
  },
};

/** The quiet line under the composer. */
export const live = {
  build() {
    this.text = el('span');
    this.context = el('span.tgw-context', { hidden: true }, el('span'), el('meter', { min: 0, max: 1, high: 0.9, 'aria-label': 'Context used' }));
    this.model = el('span.tgw-needs');
    this.el = el('div.tgw-live', {}, this.model, this.text, this.context);
    return this.el;
  },
  show(stats) {
    const s = stats || {};
    const parts = [s.tokens_per_second && `${s.tokens_per_second.toFixed(1)} tokens/s`, s.prompt_tokens && `${number.format(s.prompt_tokens)} prompt tokens`];
    this.text.textContent = parts.filter(Boolean).join(' · ');
    const known = Boolean(s.context_length && s.context_used);
    this.context.hidden = !known;
    if (!known) return;
    this.context.firstChild.textContent = `context ${number.format(s.context_used)} / ${number.format(s.context_length)}`;
    this.context.lastChild.value = s.context_used / s.context_length;
  },
};
