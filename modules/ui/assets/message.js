// One message of the conversation shown.
import { number, el, button, copyFrom } from './core.js';
import { composer } from './composer.js';

/** A column of blocks, each replaced or extended alone. */
class Blocks {
  constructor(box) { this.box = box; this.clear(); }
  clear() { this.list = []; this.code = null; this.box.textContent = ''; }
  set(htmls) { this.clear(); htmls.forEach((html, index) => this.update([index, html, true, false])); }
  update([index, html, , append]) {
    while (this.list.length <= index) { this.list.push(el('div.tgw-block')); this.box.append(this.list.at(-1)); }
    const block = this.list[index];
    if (append) {
      if (this.code?.block !== block) this.code = { block, element: [...block.querySelectorAll('code')].at(-1) };
      this.code.element.insertAdjacentHTML('beforeend', html);
    } else {
      if (this.code?.block === block) this.code = null;
      block.innerHTML = html;
    }
  }
}

const LONG = 3000;  // characters after which a user's message is folded

export class Message {
  constructor(view, chat) {
    this.chat = chat;
    this.data = view;
    this.seen = 0;
    this.ended = 0;
    const user = view.role === 'user';
    this.el = el(`article.tgw-msg.${user ? 'user' : 'assistant'}`, { 'data-id': view.id, 'aria-label': user ? 'You' : 'Reply' });
    this.thought = el('details.tgw-thought', { hidden: true }, el('summary'), el('div.tgw-prose'));
    this.body = el('div.tgw-body.tgw-prose', { dir: 'auto' });
    this.wait = el('div.tgw-wait', { hidden: true });
    this.notice = el('div.tgw-notice', { hidden: true });
    this.foot = el('footer.tgw-foot');
    this.el.append(...(user ? [] : [this.thought]), this.body, this.wait, this.notice, this.foot);
    this.answer = new Blocks(this.body);
    this.reasoning = new Blocks(this.thought.lastChild);
    this.fill(view);
  }

  get running() { return this.data.state === 'running'; }

  /** Show all of `view`. A running message may already hold what its events will bring again, so its first update starts from nothing. */
  fill(view) {
    this.data = view;
    this.stale = this.running;
    this.answer.set(view.blocks);
    this.reasoning.set(view.reasoning || []);
    this.decorate();
  }

  /** A later view of the same message; its blocks are drawn again only when they can have changed. */
  refresh(view) {
    const same = view.state === this.data.state && view.text === this.data.text;
    if (same && view.state !== 'running') { this.data = view; this.decorate(); return; }
    this.seen = 0;
    this.fill(view);
  }

  update(event) {
    if (this.stale && event.blocks.length + event.reasoning.length) { this.answer.clear(); this.reasoning.clear(); this.stale = false; }
    event.reasoning.forEach((change) => this.reasoning.update(change));
    event.blocks.forEach((change) => this.answer.update(change));
    this.growing(event);
  }

  snapshot(event) {
    this.stale = false;
    this.answer.set(event.blocks);
    this.reasoning.set(event.reasoning);
    this.growing(event);
  }

  growing({ prefill, queue }) {
    if (queue !== null && queue !== undefined) this.queued(queue);
    else if (prefill) this.progress(...prefill);
    if (!this.wait.hidden && (this.answer.list.length || this.reasoning.list.length)) this.wait.hidden = true;
    this.showThought();
  }

  showThought() {
    const state = !this.reasoning.list.length ? '' : this.running && !this.answer.list.length ? 'Thinking…' : 'Thought';
    if (state === this.thinking) return;
    this.thinking = state;
    this.thought.hidden = !state;
    this.thought.firstChild.textContent = state;
    this.thought.classList.toggle('open-ended', state === 'Thinking…');
  }

  queued(before) {
    this.wait.replaceChildren(el('i'), el('i'), el('i'), el('span', { textContent: before ? `Waiting: ${number.format(before)} before this` : 'Waiting: this is next' }));
    this.wait.hidden = false;
  }

  progress(done, total) {
    const text = `Reading prompt ${number.format(done)} / ${number.format(total)}`;
    let bar = this.wait.querySelector('progress');
    if (!bar) { bar = el('progress', { 'aria-label': 'Reading prompt' }); this.wait.replaceChildren(bar, el('span')); }
    bar.max = total;
    bar.value = done;
    bar.nextSibling.textContent = text;
    this.wait.hidden = false;
  }

  end(view) {
    const drawn = !this.stale && view.blocks.length === this.answer.list.length && (view.reasoning || []).length === this.reasoning.list.length;
    const known = { ...view, versions: this.data.versions };  // the end of a reply does not repeat them
    this.ended = performance.now();
    this.data = known;
    if (drawn) this.decorate(); else this.fill(known);
  }

  /** Everything around the text: notices, actions, figures. */
  decorate() {
    const { state, role } = this.data;
    this.el.classList.toggle('running', this.running);
    this.el.classList.toggle('folded', role === 'user' && this.data.text.length > LONG && !this.unfolded);
    this.wait.replaceChildren(el('i'), el('i'), el('i'));
    this.wait.hidden = !this.running || this.answer.list.length > 0;
    this.showThought();
    this.showNotice(state);
    this.foot.replaceChildren(...(this.running ? [] : this.actions()));
  }

  showNotice(state) {
    const words = { stopped: 'Stopped', interrupted: 'Interrupted: the server ended during this reply', failed: this.data.error || 'This reply failed' }[state];
    this.notice.hidden = !words;
    this.notice.className = `tgw-notice ${state}`;
    this.notice.replaceChildren(...(words ? [el('span', { textContent: words })] : []));
    if (!words) return;
    const again = el('span.tgw-again', {});
    if (this.data.text) again.append(el('button', { type: 'button', textContent: 'Continue', onclick: () => this.chat.continue(this) }));
    again.append(el('button', { type: 'button', textContent: 'Regenerate', onclick: () => this.chat.regenerate(this) }));
    this.notice.append(again);
  }

  actions() {
    const assistant = this.data.role === 'assistant';
    const made = [
      button('copy', 'Copy', (e) => copyFrom(e.currentTarget, this.data.text)),
      button('pen', 'Edit', () => this.edit()),
      assistant && button('redo', 'Regenerate (Ctrl+Enter)', () => this.chat.regenerate(this)),
      assistant && button('on', 'Continue (Alt+Enter)', () => this.chat.continue(this), 'button.tgw-icon.tgw-last'),
      this.el.classList.contains('folded') && el('button.tgw-unfold', { type: 'button', textContent: 'Show all', onclick: () => this.unfold() }),
      this.versions(), this.figures(),
    ];
    return made.filter(Boolean);
  }

  unfold() { this.unfolded = true; this.decorate(); }

  versions() {
    const { versions, id } = this.data;
    if (!versions || versions.length < 2) return null;
    const at = versions.indexOf(id);
    const arrow = (name, label, step) => {
      const made = button(name, label, () => this.chat.select(versions[at + step]));
      made.disabled = !versions[at + step];
      return made;
    };
    return el('span.tgw-versions', {}, arrow('left', 'Previous version', -1),
      el('span', { textContent: `${at + 1}/${versions.length}` }), arrow('right', 'Next version', 1));
  }

  figures() {
    const s = this.data.stats;
    if (!s?.tokens) return null;
    const quick = [s.tokens_per_second && `${s.tokens_per_second.toFixed(1)} tokens/s`, `${number.format(s.tokens)} token${s.tokens === 1 ? '' : 's'}`, s.seconds && `${s.seconds.toFixed(1)} s`, s.finish_reason === 'length' && 'ended at the longest allowed length'];
    const rest = [
      this.data.model && `Model: ${this.data.model}`, s.seed != null && `Seed: ${s.seed}`,
      s.prompt_tokens != null && `Prompt: ${number.format(s.prompt_tokens)} tokens, ${number.format(s.reused_tokens || 0)} of them reused`,
      s.queue_seconds >= 0.1 && `Waited ${s.queue_seconds.toFixed(1)} s for a place`,
      s.first_token_seconds != null && `First token after ${s.first_token_seconds.toFixed(2)} s`,
      s.draft_tokens && `Guessed ahead: ${number.format(s.accepted_tokens)} of ${number.format(s.draft_tokens)} tokens were right`,
      s.context_length && `Context: ${number.format(s.context_used)} of ${number.format(s.context_length)} tokens`,
      this.data.dropped_messages > 0 && `The oldest ${this.data.dropped_messages} messages did not fit the context`, this.data.created && new Date(this.data.created * 1000).toLocaleString(),
    ];
    return el('span.tgw-figures', { title: rest.filter(Boolean).join('\n'), textContent: quick.filter(Boolean).join(' · '), tabIndex: 0 });
  }

  edit() {
    if (this.el.classList.contains('editing')) return;
    const user = this.data.role === 'user';
    const area = el('textarea', { value: this.data.text, 'aria-label': 'Edit message', dir: 'auto' });
    const close = () => { form.remove(); this.el.classList.remove('editing'); };
    const save = async () => { if (area.value.trim() && await this.chat.edit(this, area.value)) close(); };
    const form = el('form.tgw-edit', { onsubmit: (e) => { e.preventDefault(); save(); } }, area,
      el('button.tgw-button', { type: 'button', textContent: 'Cancel', onclick: close }),
      el('button.tgw-button.primary', { type: 'submit', textContent: user ? 'Send' : 'Save' }));
    area.onkeydown = (e) => {
      if (e.key === 'Escape') { e.stopPropagation(); close(); composer.focus(); }
      if (e.key === 'Enter' && !e.isComposing && (user ? !e.shiftKey : e.ctrlKey || e.metaKey)) { e.preventDefault(); e.stopPropagation(); save(); }
    };
    this.el.classList.add('editing');
    this.body.after(form);
    area.focus();
  }
}
