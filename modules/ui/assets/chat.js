// The page's script: the chat pane, the model's card, the theme. Gradio mounts empty hosts (see hosts()); everything inside them is made here.
//
// No work per streamed update depends on the number of messages: a block is found by its index, and the browser lays out one message.
// Text goes in with textContent; innerHTML takes only blocks that the server has sanitised.
'use strict';
(() => {
  if (window.tgw) return;  // Gradio may insert the script again when it mounts anew

  const ROOT = new URL('.', document.baseURI);
  const TITLE = document.title || 'Text Generation Web UI';
  const PHONE = matchMedia('(max-width: 760px)');
  const TOUCH = matchMedia('(hover: none) and (pointer: coarse)');
  const number = new Intl.NumberFormat('en-US');

  // --- small helpers ---------------------------------------------------------------------------------------------------------------

  const ICONS = {
    plus: 'M12 5v14M5 12h14', search: 'M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14M20 20l-4-4', side: 'M4 5h16v14H4zM9.5 5v14',
    pen: 'M4 20h4L19 9l-4-4L4 16zM13 7l4 4', bin: 'M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13', yes: 'M5 13l4 4L19 7', no: 'M6 6l12 12M18 6L6 18',
    copy: 'M9 9h11v11H9zM5 15H4V4h11v1', redo: 'M20 11a8 8 0 1 0-2.3 5.7M20 5v6h-6', on: 'M5 12h13M13 6l6 6-6 6', left: 'M14 6l-6 6 6 6',
    right: 'M10 6l6 6-6 6', send: 'M12 19V5M6 11l6-6 6 6', stop: 'M7 7h10v10H7z', down: 'M12 5v14M6 13l6 6 6-6', chat: 'M5 5h14v11H11l-5 4v-4H5z',
    sun: 'M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6L19 19M19 5l-1.4 1.4M6.4 17.6L5 19',
    moon: 'M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z', warn: 'M12 4l9 16H3zM12 10v4M12 17v.5',
  };

  function icon(name) {
    const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
    svg.setAttribute('viewBox', '0 0 24 24');
    svg.setAttribute('aria-hidden', 'true');
    const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
    path.setAttribute('d', ICONS[name]);
    svg.append(path);
    return svg;
  }

  /** An element: el('button.primary', {onclick, 'aria-label': …}, child, 'text', …). Properties that the element has are set, the rest are attributes. */
  function el(spec, properties = {}, ...children) {
    const [tag, ...classes] = spec.split('.');
    const made = document.createElement(tag);
    made.className = classes.join(' ');
    for (const [key, value] of Object.entries(properties)) {
      if (key in made) made[key] = value; else made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function button(name, label, onclick, spec = 'button.tgw-icon') {
    return el(spec, { type: 'button', title: label, 'aria-label': label, onclick }, icon(name));
  }

  /** Calls `action` when `target` comes near the visible part of `root`. The answer's again() asks anew: a target that stays near does not report. */
  function near(target, root, rootMargin, action) {
    const observer = new IntersectionObserver(([seen]) => { if (seen.isIntersecting) action(); }, { root, rootMargin });
    observer.observe(target);
    return { again() { observer.unobserve(target); observer.observe(target); } };
  }

  function later(milliseconds, action) {
    let timer = 0;
    const run = () => { clearTimeout(timer); timer = setTimeout(action, milliseconds); };
    run.cancel = () => clearTimeout(timer);
    return run;
  }

  class ServerError extends Error {
    constructor(message, code = '', status = 0) { super(message); this.code = code; this.status = status; }
  }

  async function api(method, path, body, signal) {
    const options = { method, signal, credentials: 'same-origin' };
    if (method !== 'GET') {
      options.headers = { 'Content-Type': 'application/json', 'X-TGW': '1' };
      options.body = JSON.stringify(body ?? {});
    }
    let response;
    try {
      response = await fetch(new URL(path, ROOT), options);
    } catch {
      throw new ServerError('The server cannot be reached. Nothing is lost: try again when it is back.', 'Offline');
    }
    if (response.status === 401) {
      location.assign(new URL('login', ROOT));
      return new Promise(() => {});  // the page is going away
    }
    const data = await response.json().catch(() => ({}));
    if (response.ok) return data;
    throw new ServerError(data.error?.message || `The server answered with status ${response.status}.`, data.error?.code, response.status);
  }

  /** localStorage that may be full or forbidden: then nothing is remembered, and nothing fails. */
  const memory = {
    get(key) { try { return localStorage.getItem(key); } catch { return null; } },
    set(key, value) {
      try { if (value) localStorage.setItem(key, value); else localStorage.removeItem(key); return true; } catch { return false; }
    },
  };

  const toasts = el('div.tgw-toasts', { role: 'alert' });  // over the composer
  const floating = el('div.tgw-toasts.tgw-floating', { role: 'alert' });  // where the Chat tab is not shown

  function toast(message, kind = 'error') {
    const shown = el(`div.tgw-toast.${kind}`, {}, icon(kind === 'error' ? 'warn' : 'yes'), el('span', { textContent: message }));
    shown.append(button('no', 'Dismiss', () => shown.remove()));
    const place = root.offsetParent ? toasts : floating;
    while (place.children.length > 2) place.firstChild.remove();
    place.append(shown);
    setTimeout(() => shown.remove(), kind === 'error' ? 12000 : 3000);
  }

  /** Run `action`; what the server says against it is shown. Answers undefined then. */
  async function attempt(action) {
    try { return await action(); } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      toast(error.message);
    }
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // no clipboard API on plain http
      const area = el('textarea', { value: text, readOnly: true });
      area.style.cssText = 'position:fixed;opacity:0';
      document.body.append(area);
      area.select();
      document.execCommand('copy');
      area.remove();
    }
  }

  async function copyFrom(control, text) {
    await copy(text);
    control.classList.add('copied');
    setTimeout(() => control.classList.remove('copied'), 1400);
  }

  // --- this browser's parameters -----------------------------------------------------------------------------------------------------

  /** Changes are gathered for a moment and posted in order; a turn waits for them and carries the newest revision. */
  const session = {
    revision: 0, pending: {}, posted: Promise.resolve(),
    set(name, value) { this.pending[name] = value; this.soon(); },
    soon: later(150, () => session.flush()),
    flush() {
      this.soon.cancel();
      const changes = this.pending;
      this.pending = {};
      if (Object.keys(changes).length) this.posted = this.posted.then(() => attempt(() => this.patch(changes)));
      return this.posted;
    },
    async patch(changes) {
      try {
        this.revision = (await api('PATCH', 'chat/session', changes)).revision;
      } catch (error) {
        this.repaint();
        throw error;
      }
    },
    /** Let the controls show what the server holds. */
    repaint() { document.getElementById('tgw-repaint')?.click(); },
    async read() { const found = await api('GET', 'chat/session'); this.revision = found.revision; ahead.soon(); return found.values; },
    async save() {
      await this.flush();
      if (await attempt(() => api('POST', 'chat/session/save'))) toast('Saved: new browsers begin with these values.', 'done');
    },
    /** Post a turn. The server may have lost the session (409): then its values are adopted, once. */
    async turn(path, body) {
      await this.flush();
      try {
        return await api('POST', path, { ...body, revision: this.revision });
      } catch (error) {
        if (error.code !== 'StaleRevision') throw error;
        await this.read();
        this.repaint();
        toast('The parameters were changed elsewhere; those are used now.', 'done');
        return api('POST', path, { ...body, revision: this.revision });
      }
    },
  };

  // --- one message -------------------------------------------------------------------------------------------------------------------

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

  class Message {
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

  const PAGE = 40;  // messages that the server gives at once
  const MOST = 3 * PAGE;

  // --- the conversation shown --------------------------------------------------------------------------------------------------------

  const chat = {
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
          if (view.state === 'running' && !shown.running && shown.ended < since) shown.refresh(view);
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

  // --- list of conversations ---------------------------------------------------------------------------------------------------------

  const sidebar = {
    items: new Map(), next: null, query: '', ticket: 0,

    build() {
      this.list = el('ul.tgw-list', { 'aria-label': 'Conversations' });
      this.more = el('div.tgw-edge');
      this.empty = el('p.tgw-none', { hidden: true });
      this.field = el('input', { type: 'search', placeholder: 'Search conversations', 'aria-label': 'Search conversations', autocomplete: 'off' });
      const search = later(120, () => this.load());
      this.field.oninput = search;
      this.field.onkeydown = (e) => { if (e.key === 'ArrowDown') { e.preventDefault(); this.list.querySelector('a')?.focus(); } };
      this.el = el('aside.tgw-side', { 'aria-label': 'Conversations' },
        el('div.tgw-sidehead', {},
          el('button.tgw-new', { type: 'button', onclick: () => startNew() }, icon('plus'), 'New chat'),
          button('side', 'Hide conversations', () => this.toggle(false))),
        el('label.tgw-search', {}, icon('search'), this.field),
        el('nav.tgw-listbox', { 'aria-label': 'Conversations' }, this.list, this.empty, this.more));
      this.shade = el('div.tgw-shade', { onclick: () => this.toggle(false) });
      this.ending = near(this.more, this.list.parentNode, '300px', () => { if (this.next) this.load(true); });
      this.list.addEventListener('keydown', (e) => this.keys(e));
      return [this.el, this.shade];
    },

    toggle(open) {
      root.classList.toggle('closed', !open);
      if (!PHONE.matches) memory.set('tgw.side', open ? '' : 'closed');
    },

    async load(more = false) {
      if (more && this.loadingMore) return;
      const ticket = more ? this.ticket : ++this.ticket;
      const cursor = more ? this.next : '';
      this.loadingMore = more;
      const query = this.field.value.trim();
      const page = await attempt(() => api('GET', `chat/conversations?query=${encodeURIComponent(query)}&before=${encodeURIComponent(cursor)}`));
      this.loadingMore = false;
      if (!page || ticket !== this.ticket) return;
      this.query = query;
      if (!more) { this.items.clear(); this.list.textContent = ''; }
      this.next = page.next;
      for (const item of page.items) this.add(item);
      this.hint();
      this.ending.again();
    },

    hint() {
      this.empty.hidden = this.items.size > 0;
      this.empty.textContent = this.query ? 'Nothing found. Every word must occur in the conversation.' : 'Your conversations will be listed here. They stay on this machine.';
    },

    add(item) {
      if (this.items.has(item.id)) this.items.get(item.id).remove();
      const title = el('span.tgw-title', { textContent: item.title, dir: 'auto' });
      const open = el('a', { href: `#c=${encodeURIComponent(item.id)}` }, title);
      if (item.snippet?.length) {
        open.append(el('span.tgw-snippet', { dir: 'auto' }, ...item.snippet.map(([text, match]) => (match ? el('mark', { textContent: text }) : text))));
      }
      open.onclick = (e) => { if (!(e.ctrlKey || e.metaKey || e.shiftKey)) { e.preventDefault(); setConversation(item.id); if (PHONE.matches) this.toggle(false); } };
      open.ondblclick = () => this.rename(row);
      const row = el('li', {}, open, el('span.tgw-tools', {},
        button('pen', 'Rename (F2)', () => this.rename(row)), button('bin', 'Delete', () => this.askDelete(row))));
      row.item = item;
      row.classList.toggle('running', Boolean(item.running));
      row.classList.toggle('current', item.id === chat.id);
      this.items.set(item.id, row);
      this.list.insertBefore(row, this.query ? null : this.place(item.updated));
    },

    place(updated) {
      let at = this.list.firstChild;
      while (at && at.item.updated > updated) at = at.nextSibling;
      return at;
    },

    changed(item) {
      const row = this.items.get(item.id);
      if (item.id === chat.id && item.title) chat.retitle(item.title);
      if (!row) { if (!this.query) this.add(item); this.hint(); return; }
      const moves = !this.query && item.updated > row.item.updated && row !== this.list.firstChild;
      Object.assign(row.item, item);
      row.classList.toggle('running', Boolean(row.item.running));
      if (!row.classList.contains('busy')) row.querySelector('.tgw-title').textContent = row.item.title;
      if (moves) { row.remove(); this.list.insertBefore(row, this.place(row.item.updated)); }
    },

    gone(id) {
      this.items.get(id)?.remove();
      this.items.delete(id);
      this.hint();
      if (id === chat.id) setConversation(null, true);
    },

    mark(id) {
      this.list.querySelector('.current')?.classList.remove('current');
      this.items.get(id)?.classList.add('current');
    },

    /** Put `inside` in the place of the row's contents until close() is called. */
    replace(row, inside) {
      const former = [...row.childNodes];
      const focus = row.querySelector('a');
      row.classList.add('busy');
      row.replaceChildren(inside);
      return () => { if (!row.classList.contains('busy')) return; row.classList.remove('busy'); row.replaceChildren(...former); focus.focus(); };
    },

    rename(row) {
      if (row.classList.contains('busy')) return;
      const field = el('input.tgw-rename', { value: row.item.title, 'aria-label': 'New name', maxLength: 200 });
      const close = this.replace(row, field);
      const done = async (save) => {
        const title = field.value.trim();
        field.onblur = null;
        close();
        if (!save || !title || title === row.item.title) return;
        if (await attempt(() => api('PATCH', `chat/conversations/${encodeURIComponent(row.item.id)}`, { title }))) this.changed({ ...row.item, title });
      };
      field.onkeydown = (e) => {
        e.stopPropagation();
        if (e.key === 'Enter' && !e.isComposing) { e.preventDefault(); done(true); }
        if (e.key === 'Escape') done(false);
      };
      field.onblur = () => done(true);
      field.focus();
      field.select();
    },

    askDelete(row) {
      if (row.classList.contains('busy')) return;
      const yes = button('yes', 'Yes, delete', async () => {
        close();
        if (await attempt(() => api('DELETE', `chat/conversations/${encodeURIComponent(row.item.id)}`))) this.gone(row.item.id);
      }, 'button.tgw-icon.danger');
      const no = button('no', 'No, keep it', () => close());
      const asked = el('span.tgw-confirm', { role: 'group', 'aria-label': 'Delete this conversation?' }, el('span', { textContent: 'Delete?' }), yes, no);
      const close = this.replace(row, asked);
      asked.onkeydown = (e) => { if (e.key === 'Escape') { e.stopPropagation(); close(); } };
      no.focus();
    },

    keys(e) {
      const row = e.target.closest('li');
      if (!row || e.target.tagName !== 'A') return;
      const go = { ArrowDown: row.nextSibling, ArrowUp: row.previousSibling, Home: this.list.firstChild, End: this.list.lastChild };
      if (e.key in go) { e.preventDefault(); (go[e.key]?.querySelector('a') || (e.key === 'ArrowUp' ? this.field : null))?.focus(); }
      if (e.key === 'F2') { e.preventDefault(); this.rename(row); }
      if (e.key === 'Delete') { e.preventDefault(); this.askDelete(row); }
    },
  };

  // --- what is being typed -----------------------------------------------------------------------------------------------------------

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

  const composer = {
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
  const ahead = {
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
  const live = {
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

  // --- the model ---------------------------------------------------------------------------------------------------------------------

  const sheet = new CSSStyleSheet();  // rules instead of classes, because Gradio draws a tab when it is first opened
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];

  const model = {
    status: { state: 'none', progress: 0, text: '' }, chosen: {}, loader: '', filtered: false, engine: null,

    build() {
      document.addEventListener('visibilitychange', () => this.watch());
      this.chip = el('button.tgw-chip', { type: 'button', onclick: () => openTab('model') }, el('i'), el('span'));
      return this.chip;
    },

    card(host) {
      this.host = host;
      this.paint();
      this.observer?.disconnect();
      this.observer = new IntersectionObserver((seen) => { this.seen = seen.at(-1).isIntersecting; this.watch(); });
      this.observer.observe(host);
    },

    /** Ask what the engine does, now and every two seconds, while the card can be seen. */
    async watch() {
      const turn = this.turn = {};  // whoever is called last goes on
      while (this.seen && !document.hidden && this.status.state === 'ready') {
        const told = await api('GET', 'models/status').catch(() => null);  // without a connection the banner says so
        if (turn !== this.turn) return;
        if (told?.status.state === 'ready' && told.status.name === this.status.name) {  // another model tells itself
          this.status.memory = told.status.memory;
          this.engine = told.engine;
          this.figures();
        }
        await new Promise((done) => setTimeout(done, 2000));
        if (turn !== this.turn) return;
      }
    },

    show(status) {
      if (status.state !== 'ready' || status.name !== this.status.name) this.engine = null;
      this.status = status;
      const name = status.name?.split('/').at(-1).replace(/\.gguf$/i, '') || '';
      const percent = `${Math.round((status.progress || 0) * 100)} %`;
      const words = { none: 'No model', loading: `Loading ${name} ${percent}`, ready: name, failed: 'Model failed to load' }[status.state];
      this.chip.dataset.state = status.state;
      this.chip.lastChild.textContent = words;
      this.chip.title = status.text || words;
      this.tell(status, percent);
      this.paint();
      this.rules();
      this.watch();
    },

    /** Under the composer and in the empty conversation: what is missing before one can talk. */
    tell(status, percent) {
      const choose = openTab.exists('model') ? el('button', { type: 'button', textContent: 'Choose one on the Model tab', onclick: () => openTab('model') }) : null;
      const text = { none: 'No model is loaded. ', failed: 'The model could not be loaded. ', loading: `Loading the model… ${percent}` }[status.state];
      live.model.replaceChildren(...(text ? [el('i', { 'data-state': status.state }), text, ...(choose && status.state !== 'loading' ? [choose] : [])] : []));
      const hint = status.state === 'ready' ? 'Your messages stay on this machine. Enter sends, Shift+Enter begins a new line.' : text;
      chat.welcome.querySelector('p').textContent = hint || '';
    },

    paint() {
      if (!this.host) return;
      const s = this.status;
      const heading = { none: 'No model is loaded', loading: 'Loading', ready: 'Ready', failed: 'Could not load the model' }[s.state];
      const told = el('div', { 'aria-live': 'polite' }, el('header', {}, el('i'), el('strong', { textContent: heading }), el('span', { textContent: s.name || '' })));
      if (s.state === 'loading') told.append(el('progress', { max: 1, value: s.progress, 'aria-label': 'Loading' }));
      if (s.text) told.append(el(s.state === 'failed' ? 'pre' : 'p', { textContent: s.text }));
      this.facts = el('dl');
      this.cache = el('div.tgw-cache', {}, el('span', { textContent: 'Cache in use' }), el('span'), el('meter', { 'aria-label': 'Cache in use' }));
      this.figures();
      this.host.replaceChildren(el('section.tgw-card', { 'data-state': s.state }, told, this.facts, this.cache));
    },

    /** The numbers below. Changing ones are not read out, and only what has changed is touched, so that text stays selected. */
    figures() {
      const s = this.status, e = this.engine;
      const facts = [
        s.loader && ['Loader', s.loader], s.context_length && ['Context', `${number.format(s.context_length)} tokens`],
        s.memory && ['Memory', bytes(s.memory)],
        e && ['Replies under way', `${e.busy} of ${e.parallel}`], e && ['Waiting', number.format(e.waiting)],
        e && ['Chats kept', number.format(e.kept) + (e.spilled ? ` + ${number.format(e.spilled)} in main memory (${bytes(e.spilled_bytes)})` : '')],
      ].filter(Boolean);
      const shown = [...this.facts.querySelectorAll('dt')].map((name) => name.textContent);
      if (facts.map(([name]) => name).join() !== shown.join()) {
        this.facts.replaceChildren(...facts.map(([name]) => el('div', {}, el('dt', { textContent: name }), el('dd'))));
      }
      facts.forEach(([, value], n) => write(this.facts.children[n].lastChild, value));
      this.facts.hidden = !facts.length;
      this.cache.hidden = !e?.cells;
      if (!e?.cells) return;
      const [, words, bar] = this.cache.children;
      write(words, `${number.format(e.cells_used)} of ${number.format(e.cells)} tokens`);
      bar.max = e.cells;
      bar.value = e.cells_used;
    },

    /** Which controls are visible: parameters that the loader honours (if asked), and the options of the chosen loader. */
    rules() {
      const names = this.filtered && this.status.samplers || [];
      const honoured = names.map((name) => `:not(.knob-${CSS.escape(name)})`).join('');
      const css = [honoured && `.tgw-sampler${honoured} { display: none !important }`];
      if (this.loader) css.push(`.tgw-loader:not(.loader-${CSS.escape(slug(this.loader))}) { display: none !important }`);
      css.push(this.status.state === 'loading' ? '.tgw-when-idle { display: none !important }' : '.tgw-when-loading { display: none !important }');
      if (this.status.state !== 'ready') css.push('.tgw-when-ready { opacity: .5; pointer-events: none }');
      sheet.replaceSync(css.filter(Boolean).join('\n'));
    },
  };

  function bytes(count) { return count > 1e9 ? `${(count / 2 ** 30).toFixed(1)} GiB` : `${Math.round(count / 2 ** 20)} MiB`; }

  function write(element, text) { if (element.textContent !== text) element.textContent = text; }

  function slug(loader) { return loader.toLowerCase().replace(/[^a-z0-9]+/g, '-'); }

  function openTab(id) { document.querySelector(`[role=tab][data-tab-id="${id}"]`)?.click(); }
  openTab.exists = (id) => Boolean(document.querySelector(`[role=tab][data-tab-id="${id}"]`));

  // --- events from the server --------------------------------------------------------------------------------------------------------

  const link = {
    delay: 250, heard: 0, greeted: false, failures: 0,

    build() {
      this.banner = el('div.tgw-banner', { hidden: true, role: 'status', textContent: 'Reconnecting… What you type is kept.' });
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
      const reply = chat.running;
      const replies = reply ? { [reply.data.id]: reply.seen } : {};
      this.socket.send(JSON.stringify({ type: 'follow', conversation: chat.id, replies }));
    },

    receive(event) {
      const here = event.conversation === chat.id;
      if (event.reply) chat.received(event);
      else if (event.type === 'hello') this.hello();
      else if (event.type === 'model') { model.show(event.status); ahead.fresh(event.status); }
      else if (event.type === 'conversations') { event.changed?.forEach((item) => sidebar.changed(item)); event.deleted?.forEach((id) => sidebar.gone(id)); }
      else if (event.type === 'started' && here) chat.began(event.messages);
      else if (event.type === 'changed' && here) chat.reload();
    },

    /** After a break in the connection, events may be missing: everything shown is read again. */
    hello() {
      if (this.greeted) { ahead.told = ''; sidebar.load(); chat.reload(); }
      this.greeted = true;
    },
  };

  // --- theme -------------------------------------------------------------------------------------------------------------------------

  const theme = {
    preferred: matchMedia('(prefers-color-scheme: dark)'), setting: 'auto',
    build() {
      this.control = button('moon', 'Change between light and dark', () => {
        memory.set('tgw.theme', this.dark() ? 'light' : 'dark');
        this.apply();
      });
      this.preferred.addEventListener('change', () => this.apply());  // after Gradio's own listener, which was there before
      this.apply();
      return this.control;
    },
    dark() {
      const chosen = memory.get('tgw.theme') || { on: 'dark', off: 'light' }[this.setting];
      return chosen ? chosen === 'dark' : this.preferred.matches;
    },
    apply() {
      const dark = this.dark();
      document.body.classList.toggle('dark', dark);
      document.documentElement.style.colorScheme = dark ? 'dark' : 'light';
      this.control.replaceChildren(icon(dark ? 'sun' : 'moon'));
    },
  };

  // --- putting it together -----------------------------------------------------------------------------------------------------------

  const root = el('div.tgw');

  function build() {
    const [scroller, announce] = chat.build();
    const bar = el('div.tgw-bar', {}, button('side', 'Show conversations', () => sidebar.toggle(true)), chat.heading,
      button('plus', 'New chat', () => startNew()));
    root.append(...sidebar.build(), el('section.tgw-main', { 'aria-label': 'Conversation' }, bar, scroller, announce,
      el('div.tgw-dock', {}, chat.jump, link.build(), toasts, composer.build(), live.build())));
    chat.jump.hidden = true;
    root.classList.toggle('closed', PHONE.matches || memory.get('tgw.side') === 'closed');
    PHONE.addEventListener('change', () => root.classList.toggle('closed', PHONE.matches || memory.get('tgw.side') === 'closed'));
    document.addEventListener('keydown', keys);
    addEventListener('hashchange', () => { if (shownInAddress() !== chat.id) chat.open(shownInAddress()); });
  }

  function shownInAddress() {
    return /^#c=([\w-]+)$/.exec(location.hash)?.[1] ?? null;
  }

  function setConversation(id, replace = false) {
    const hash = id ? `#c=${encodeURIComponent(id)}` : '';
    if (replace || !hash) history[replace ? 'replaceState' : 'pushState'](null, '', location.pathname + location.search + hash);
    else location.hash = hash;
    if (id !== chat.id || !id) chat.open(id);
  }

  function startNew() {
    if (chat.id) setConversation(null);
    if (PHONE.matches) sidebar.toggle(false);
    composer.box.focus();
  }

  /** Keys that work anywhere on the Chat tab. */
  function keys(e) {
    if (!root.offsetParent || e.isComposing || e.defaultPrevented) return;
    const reply = chat.last()?.data.role === 'assistant' ? chat.last() : null;
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName) && (document.activeElement !== composer.box || composer.box.value);
    const focus = document.activeElement;
    const elsewhere = focus !== composer.box && (/^(INPUT|TEXTAREA|SELECT)$/.test(focus?.tagName) || focus?.closest('[role=tablist]'));
    if (e.key === 'Escape' && PHONE.matches && !root.classList.contains('closed')) sidebar.toggle(false);
    else if (e.key === 'Escape' && chat.running) { e.preventDefault(); chat.stop(); }
    else if (elsewhere) return;  // an edit form, a search field or the row of tabs has keys of its own
    else if (e.key === 'Enter' && (e.ctrlKey || e.metaKey) && reply) { e.preventDefault(); chat.regenerate(reply); }
    else if (e.key === 'Enter' && e.altKey && reply) { e.preventDefault(); chat.continue(reply); }
    else if ((e.key === 'ArrowLeft' || e.key === 'ArrowRight') && !typing && reply && !e.ctrlKey && !e.altKey && !e.metaKey && !e.shiftKey) turnPage(e, reply);
  }

  /** Left and right show other versions of the last reply; right at the newest makes a new one. */
  function turnPage(e, reply) {
    if (chat.running) return;
    const versions = reply.data.versions || [reply.data.id];
    const next = versions.indexOf(reply.data.id) + (e.key === 'ArrowLeft' ? -1 : 1);
    e.preventDefault();
    if (versions[next]) chat.select(versions[next]); else if (next > 0) chat.regenerate(reply);
  }

  /** What Gradio's controls and hosts call. */
  window.tgw = {
    set: (name, value) => session.set(name, value),
    setMany(values) { Object.assign(session.pending, values); session.flush(); },
    save: () => session.save(),
    filter(on) { model.filtered = on; model.rules(); },
    option(loader, name, value) { (model.chosen[loader] ??= {})[name] = value; },
    loader(name) { model.loader = name; model.rules(); },
    modelNow: () => model.status.name,
    async models() { return (await attempt(() => api('GET', 'models')))?.models || []; },
    loadModel(name, loader) {
      if (!name) return toast('Choose a model first.');
      const options = loader ? model.chosen[loader] : Object.assign({}, ...Object.values(model.chosen));
      return attempt(() => api('POST', 'models/load', { name, loader: loader || '', options: options || {} }));
    },
    unloadModel: () => attempt(() => api('POST', 'models/unload')),
    cancelLoad: () => attempt(() => api('POST', 'models/cancel')),
    /** Fill a host that Gradio has mounted; again after it mounted anew. */
    mount(kind, host) {
      if (kind === 'header') {
        theme.setting = host.querySelector('[data-theme]')?.dataset.theme || 'auto';
        theme.apply();
        host.replaceChildren(el('div.tgw-brand', { textContent: TITLE }), model.chip, theme.control);
      }
      if (kind === 'chat') { host.replaceChildren(root); model.show(model.status); composer.focus(); }
      if (kind === 'status') model.card(host);
    },
  };

  document.body.append(floating);
  build();
  model.build();
  theme.build();
  model.show(model.status);
  for (const [kind, host] of window.tgwHosts || []) window.tgw.mount(kind, host);
  sidebar.load();
  chat.open(shownInAddress());
  session.read().catch(() => {});
  link.connect();
})();
