// One message of the conversation shown.
import { ICONS, number, icon, el, button, copyFrom, menu, api, attempt, write, t } from './core.js';
import { composer } from './composer.js';
import { explain } from './explain.js';
import { openTree } from './tree.js';

Object.assign(ICONS, {
  branch: 'M7 4v16M7 15c0-5 10-3 10-9M14 9l3-3 3 3', look: 'M3 12s3.5-6 9-6 9 6 9 6-3.5 6-9 6-9-6-9-6M12 9.5a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5',
});

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

/** The first letter of a name, whatever its alphabet. */
function letter(name) { return ([...name.trim()][0] || '?').toLocaleUpperCase(); }

/** Whether a reply and its prompt filled the context. */
export function filled(stats) { return Boolean(stats.context_length && (stats.prompt_tokens || 0) + (stats.tokens || 0) >= stats.context_length); }

/** Why a reply was cut off, if it was. */
function ending(stats) {
  if (stats?.finish_reason !== 'length') return null;
  return filled(stats) ? t('ended because the context is full') : t('ended at the longest allowed length');
}

export class Message {
  /** `data`: what the server told of it, without the blocks, which stand in the page. */
  constructor(view, chat) {
    this.chat = chat;
    this.seen = 0;
    this.ended = 0;
    this.column = null;  // what it is called while it stands beside others
    this.mine = view.role === 'user';
    this.el = el(`article.tgw-msg.${this.mine ? 'user' : 'assistant'}`, { 'data-id': view.id });
    this.who = el('div.tgw-who', { hidden: true });
    this.thought = el('details.tgw-thought', { hidden: true }, el('summary'), el('div.tgw-prose'));
    this.body = el('div.tgw-body.tgw-prose', { dir: 'auto' });
    this.wait = el('div.tgw-wait', { hidden: true });
    this.notice = el('div.tgw-notice', { hidden: true });
    this.foot = el('footer.tgw-foot');
    this.el.append(this.who, ...(this.mine ? [] : [this.thought]), this.body, this.wait, this.notice, this.foot);
    this.answer = new Blocks(this.body);
    this.reasoning = new Blocks(this.thought.lastChild);
    this.fill(view);
  }

  get running() { return this.data.state === 'running'; }

  /** The element in the column of messages that it stands in: its own, or the row of replies side by side. */
  get place() { return this.el.parentNode?.closest('.tgw-columns') ?? this.el; }

  know({ blocks, reasoning, ...rest }) { this.data = rest; return [blocks, reasoning || []]; }

  /** Show all of `view`. A running message may already hold what its events will bring again, so its first update starts from nothing. */
  fill(view) {
    const [blocks, reasoning] = this.know(view);
    this.stale = this.running;
    this.answer.set(blocks);
    this.reasoning.set(reasoning);
    this.wait.replaceChildren(el('i'), el('i'), el('i'));
    this.wait.hidden = !this.running || blocks.length > 0 || reasoning.length > 0;
    this.decorate();
  }

  /** A later view of the same message; its blocks are drawn again only when they can have changed. A running reply is told by its events. */
  refresh(view) {
    const same = view.state === this.data.state && (view.state === 'running' || view.text === this.data.text);
    if (same) { this.know(view); this.decorate(); return; }
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

  growing({ prefill, queue, note, stats }) {
    if (note) this.waiting(t(note));
    else if (queue !== null && queue !== undefined) this.waiting(queue ? t('Waiting: {count} before this', { count: number.format(queue) }) : t('Waiting: this is next'));
    else if (prefill) this.progress(...prefill);
    if (!this.wait.hidden && (this.answer.list.length || this.reasoning.list.length)) this.wait.hidden = true;
    this.showThought(stats?.reasoning_tokens);
  }

  /** The folded thinking, with how much of it there is. */
  showThought(tokens) {
    this.thought.hidden = !this.reasoning.list.length;
    if (this.thought.hidden) return;
    const thinking = this.running && !this.answer.list.length;
    const count = tokens && number.format(tokens);
    const words = thinking ? (count ? t('Thinking… {count} tokens', { count }) : t('Thinking…')) : (count ? t('Thought · {count} tokens', { count }) : t('Thought'));
    write(this.thought.firstChild, words);
    this.thought.classList.toggle('open-ended', thinking);
  }

  waiting(text) {
    this.wait.replaceChildren(el('i'), el('i'), el('i'), el('span', { textContent: text }));
    this.wait.hidden = false;
  }

  progress(done, total) {
    let bar = this.wait.querySelector('progress');
    if (!bar) { bar = el('progress', { 'aria-label': t('Reading prompt') }); this.wait.replaceChildren(bar, el('span')); }
    bar.max = total;
    bar.value = done;
    bar.nextSibling.textContent = t('Reading prompt {done} / {total}', { done: number.format(done), total: number.format(total) });
    this.wait.hidden = false;
  }

  end(view) {
    const drawn = !this.stale && view.blocks.length === this.answer.list.length && (view.reasoning || []).length === this.reasoning.list.length;
    const known = { ...view, versions: this.data.versions };  // the end of a reply does not repeat them
    this.ended = performance.now();
    if (!drawn) { this.fill(known); return; }
    this.know(known);
    this.wait.hidden = true;
    this.decorate();
  }

  /** Stand beside other replies under this name, or (null) alone again. */
  aside(column) {
    this.column = column;
    this.decorate();
  }

  // --- around the text -----------------------------------------------------------------------------------------------------------------

  decorate() {
    const { name, pinned, text, reasoning_tokens: tokens, stats } = this.data;
    this.el.classList.toggle('running', this.running);
    this.el.classList.toggle('aside', Boolean(this.column));
    this.el.classList.toggle('folded', this.mine && text.length > LONG && !this.unfolded);
    this.el.setAttribute('aria-label', this.column || name || (this.mine ? t('You') : t('Reply')));
    this.showWho(name, pinned);
    this.showThought(tokens ?? stats?.reasoning_tokens);
    this.showNotice();
    const focus = this.foot.contains(document.activeElement) && document.activeElement.getAttribute('aria-label');
    this.foot.replaceChildren(...this.actions());
    if (focus) this.foot.querySelector(`[aria-label="${CSS.escape(focus)}"]`)?.focus({ preventScroll: true });
  }

  showWho(name, pinned) {
    const made = [
      name && el('span.tgw-avatar', { 'aria-hidden': 'true', textContent: letter(name) }),
      name && el('span.tgw-name', { textContent: name, dir: 'auto' }),
      this.column && el('span.tgw-ordinal', { textContent: this.column }),
      pinned && el('span.tgw-pinned', { title: t('Stays in the prompt when the context is full') }, icon('pin'), t('pinned')),
    ].filter(Boolean);
    this.who.hidden = !made.length;
    this.who.replaceChildren(...made);
  }

  showNotice() {
    const { state, text, greeting } = this.data;
    const error = this.data.error || this.data.stats?.warning;
    const words = { stopped: t('Stopped'), interrupted: t('Interrupted: the server ended during this reply'), failed: error || t('This reply failed') }[state]
      || (error && state === 'done' ? error : '');
    this.notice.hidden = !words;
    this.notice.className = `tgw-notice ${state === 'done' ? 'failed' : state}`;
    this.notice.replaceChildren(...(words ? [el('span', { textContent: words })] : []));
    if (!words || this.column || this.mine || greeting || state === 'done') return;
    const again = el('span.tgw-again', {});
    const begun = text || this.reasoning.list.length;
    if (begun) again.append(el('button.tgw-last', { type: 'button', textContent: t('Continue'), onclick: () => this.chat.continue(this) }));
    again.append(el('button', { type: 'button', textContent: t('Regenerate'), onclick: () => this.chat.regenerate(this) }));
    this.notice.append(again);
  }

  actions() {
    const { id, text } = this.data;
    const copy = button('copy', t('Copy'), (e) => copyFrom(e.currentTarget, text));
    if (this.running) return [this.stopper()];
    if (!id) return [copy];  // a greeting of a chat that is not there yet
    if (this.column) return [this.chooser(), copy, this.explainer(), this.figures()].filter(Boolean);
    const reply = !this.mine && !this.data.greeting;
    const more = button('more', t('More to do with this message'), () => this.more(more));
    more.setAttribute('aria-haspopup', 'menu');
    return [
      copy,
      button('pen', t('Edit'), () => this.edit()),
      reply && button('redo', t('Regenerate'), () => this.chat.regenerate(this)),
      reply && button('on', t('Continue'), () => this.chat.continue(this), 'button.tgw-icon.tgw-last'),
      more,
      this.el.classList.contains('folded') && el('button.tgw-unfold', { type: 'button', textContent: t('Show all'), onclick: () => this.unfold() }),
      this.versions(), this.figures(),
    ].filter(Boolean);
  }

  stopper() {
    return el('button.tgw-stop', { type: 'button', title: t('Stop this reply'), 'aria-label': t('Stop this reply'), onclick: () => this.chat.stop(this) },
      icon('stop'), el('span', { textContent: t('Stop') }));
  }

  chooser() {
    return el('button.tgw-button.tgw-choose-this', { type: 'button', textContent: t('Choose this one'), onclick: () => this.chat.choose(this) });
  }

  explainer() { return this.data.explained && button('look', t('Explain'), () => explain(this)); }

  /** The menu of what is done more rarely. */
  more(anchor) {
    const { pinned, explained, greeting, id } = this.data;
    const reply = !this.mine && !greeting;
    menu(anchor, [
      explained && [t('Explain'), () => explain(this), 'look'],
      reply && [t('Several answers…'), () => menu(anchor, [2, 3, 4].map((n) => [t('{count} answers', { count: n }), () => this.chat.regenerate(this, { n }), 'several'])), 'several'],
      reply && [t('Answer again with…'), () => this.otherwise(anchor), 'swap'],
      [t('Branch into a new chat'), () => this.chat.branch(this), 'branch'],
      [t('All branches of this chat'), () => openTree(this.chat.id, id), 'tree'],
      [pinned ? t('Unpin') : t('Pin'), () => this.chat.pin(this, !pinned), 'pin'],
      [t('Remove'), () => this.chat.remove(this), 'bin'],
    ]);
  }

  /** With which preset, adapter or other model the same question is answered once more, beside this reply. */
  async otherwise(anchor) {
    const found = await attempt(() => api('GET', 'chat/library'));
    if (!found) return;
    const again = (extra) => () => this.chat.again(this, extra);
    const adapters = found.adapters || [];
    menu(anchor, [
      ...found.other_models.map((model) => [t('Model {name}', { name: model }), again({ model })]),
      ...found.presets.map((preset) => [t('Preset {name}', { name: preset }), again({ preset })]),
      ...adapters.map((name) => [t('Adapter {name}', { name }), again({ adapters: [[name, 1]] })]),
      adapters.length && [t('Without adapters'), again({ adapters: [] })],
    ]);
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
    return el('span.tgw-versions', {}, arrow('left', t('Previous version'), -1),
      el('span', { textContent: `${at + 1}/${versions.length}` }), arrow('right', t('Next version'), 1));
  }

  figures() {
    const { stats: s, model, explained, dropped_messages: dropped, created } = this.data;
    if (!s?.tokens) return null;
    const quick = [
      s.tokens_per_second && t('{speed} tokens/s', { speed: number.format(s.tokens_per_second, 1) }),
      s.tokens === 1 ? t('1 token') : t('{count} tokens', { count: number.format(s.tokens) }),
      s.seconds && t('{count} s', { count: number.format(s.seconds, 1) }),
      ending(s),
      dropped > 0 && t('The oldest {count} messages did not fit the context', { count: number.format(dropped) }),
    ];
    const rest = [
      model && t('Model: {name}', { name: model }), s.seed != null && t('Seed: {seed}', { seed: s.seed }),
      s.prompt_tokens != null && t('Prompt: {count} tokens, {reused} of them reused', { count: number.format(s.prompt_tokens), reused: number.format(s.reused_tokens || 0) }),
      s.queue_seconds >= 0.1 && t('Waited {seconds} s for a place', { seconds: number.format(s.queue_seconds, 1) }),
      s.first_token_seconds != null && t('First token after {seconds} s', { seconds: number.format(s.first_token_seconds, 2) }),
      s.draft_tokens && t('Guessed ahead: {right} of {count} tokens were right', { right: number.format(s.accepted_tokens), count: number.format(s.draft_tokens) }),
      s.context_length && t('Context: {used} of {length} tokens', { used: number.format(s.context_used), length: number.format(s.context_length) }),
      created && new Date(created * 1000).toLocaleString(),
    ];
    const told = { title: rest.filter(Boolean).join('\n'), textContent: quick.filter(Boolean).join(' · ') };
    return explained ? el('button.tgw-figures', { type: 'button', ...told, onclick: () => explain(this) }) : el('span.tgw-figures', { ...told, tabIndex: 0 });
  }

  // --- editing -------------------------------------------------------------------------------------------------------------------------

  edit() {
    if (this.el.classList.contains('editing') || this.running) return;
    const area = el('textarea', { value: this.data.text, 'aria-label': t('Edit message'), dir: 'auto' });
    const close = () => { this.editing = null; form.remove(); this.el.classList.remove('editing'); };
    const save = async (answer) => {
      this.editing = null;  // it is not lost if another version takes this one's place
      if (area.value.trim() && await this.chat.edit(this, area.value, answer)) close(); else if (form.isConnected) this.editing = area;
    };
    const made = (label, action, spec = 'button.tgw-button') => el(spec, { type: 'button', textContent: label, onclick: action });
    const form = el('form.tgw-edit', { onsubmit: (e) => e.preventDefault() }, area, made(t('Cancel'), close),
      this.mine ? made(t('Save only'), () => save(false)) : null,
      made(this.mine ? t('Send') : t('Save'), () => save(true), 'button.tgw-button.primary'));
    area.onkeydown = (e) => {
      if (e.key === 'Escape') { e.stopPropagation(); close(); composer.focus(); }
      if (e.key === 'Enter' && !e.isComposing && (this.mine ? !e.shiftKey : e.ctrlKey || e.metaKey)) { e.preventDefault(); e.stopPropagation(); save(true); }
    };
    this.editing = area;
    this.el.classList.add('editing');
    this.body.after(form);
    area.focus();
  }

  /** It leaves the page: what was typed into it is not lost. */
  rescue() {
    const text = this.editing?.value;
    this.editing = null;
    if (text && text !== this.data.text) composer.put([composer.box.value.trim(), text].filter(Boolean).join('\n\n'));
  }

  /** Bring it into sight. */
  reveal() {
    this.el.tabIndex = -1;
    this.el.focus({ preventScroll: true });
    this.el.scrollIntoView({ block: 'start' });
    requestAnimationFrame(() => this.el.scrollIntoView({ block: 'start' }));  // what is above had not been measured yet
    this.el.classList.add('found');
    setTimeout(() => this.el.classList.remove('found'), 2600);
  }
}
