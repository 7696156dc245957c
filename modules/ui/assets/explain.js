// How a reply was made: model, parameters, prompt, and its tokens with what might have stood in their places.
import { ServerError, el, api, attempt, button, copyFrom, dialog, number, t } from './core.js';
import { chat } from './chat.js';
import { filled } from './message.js';

/** Probabilities from which on a token is less and less surprising; what is below the last is level 5. Each about a third of the one before. */
const LEVELS = [0.6, 0.25, 0.1, 0.03, 0.01];

function level(logprob) {
  if (logprob === null) return 'none';
  const found = LEVELS.findIndex((least) => Math.exp(logprob) >= least);
  return found < 0 ? LEVELS.length : found;
}

function percent(probability) {
  const value = 100 * probability;
  return `${value >= 10 ? number.format(value, 1) : value >= 0.001 ? Number(value.toPrecision(2)) : '< 0.001'} %`;
}

/** A token as it is shown: line ends can be seen, and what has no text of its own. */
function visible(text) { return text === '' ? '·' : text.replaceAll('\n', '↵\n'); }

/** Show how `message` was made. */
export async function explain(message) {
  const [conversation, { id, text }] = [chat.id, message.data];
  const told = await attempt(() => api('GET', `chat/explain/${encodeURIComponent(conversation)}/${encodeURIComponent(id)}`));
  if (!told || conversation !== chat.id) return;
  const leave = (action) => { shown.close(); action(); };
  const tokens = told.tokens.length ? new Tokens(told, text, {
    ask: (position) => api('POST', 'chat/alternatives', { conversation, message: id, position }),
    resume: (position, token) => leave(() => chat.turn('chat/resume', { message: id, position, token })),
  }) : null;
  const shown = dialog(t('How this reply was made'), el('div.tgw-explain', {}, facts(told),
    tokens ? tokens.el : el('p.tgw-told', { textContent: t('Its tokens can be shown while the model that wrote it is loaded.') }),
    prompt(told), repeat(told, () => leave(() => chat.turn('chat/repeat', { message: id })))));
}

// --- facts -------------------------------------------------------------------------------------------------------------------------------

function facts({ model, model_hash: hash, seed, parameters, adapters, stats: s, created, prompt_tokens: prompted }) {
  const seconds = (value, digits = 2) => (value != null ? t('{count} s', { count: number.format(value, digits) }) : null);
  const speed = s.tokens_per_second && t('{speed} tokens/s', { speed: number.format(s.tokens_per_second, 1) });
  const lines = [
    [t('Model'), model],
    [t('File hash'), hash && fingerprint(hash)],
    [t('Adapters'), adapters.map(([name, scale]) => `${name} × ${scale}`).join(', ')],
    [t('Seed'), seed],
    [t('Changed parameters'), changed(parameters)],
    [t('Reply'), s.tokens != null && [t('{count} tokens', { count: number.format(s.tokens) }), seconds(s.seconds, 1), speed].filter(Boolean).join(' · ')],
    [t('Thinking'), s.reasoning_tokens && t('{count} tokens', { count: number.format(s.reasoning_tokens) })],
    [t('The prompt'), prompted != null && t('{count} tokens, {reused} of them reused', { count: number.format(prompted), reused: number.format(s.reused_tokens || 0) })],
    [t('First token after'), seconds(s.first_token_seconds)],
    [t('Waited'), s.queue_seconds >= 0.1 && seconds(s.queue_seconds, 1)],
    [t('Ended'), { stop: t('by itself'), length: filled(s) ? t('because the context is full') : t('at the longest allowed length'), cancelled: t('it was stopped') }[s.finish_reason]],
    [t('Written'), created && new Date(created * 1000).toLocaleString()],
  ];
  return el('dl.tgw-facts', {}, ...lines.filter(([, value]) => value || value === 0).map(([name, value]) => el('div', {}, el('dt', { textContent: name }), el('dd', {}, value))));
}

function fingerprint(hash) {
  const control = button('copy', t('Copy the hash'), (e) => copyFrom(e.currentTarget, hash));
  return el('span.tgw-hash', { title: hash }, el('code', { textContent: hash.slice(0, 12) }), control);
}

function changed(parameters) {
  const lines = Object.entries(parameters).map(([name, value]) => el('span', {}, `${name} `, el('b', { textContent: typeof value === 'string' ? value : JSON.stringify(value) })));
  return lines.length ? el('span.tgw-parameters', {}, ...lines) : t('none');
}

function prompt({ prompt: text, prompt_tokens: count }) {
  const name = count != null ? t('Prompt: {count} tokens', { count: number.format(count) }) : t('The prompt');
  const made = el('details.tgw-prompt', {}, el('summary', { textContent: name }));
  made.ontoggle = () => {  // it can be long: made when it is wanted
    if (!made.open || made.childElementCount > 1) return;
    made.append(button('copy', t('Copy the prompt'), (e) => copyFrom(e.currentTarget, text)), el('pre', { textContent: text, tabIndex: 0, dir: 'auto', 'aria-label': t('The prompt') }));
  };
  return made;
}

function repeat({ repeatable, why_not: why }, run) {
  const made = el('button.tgw-button.primary', { type: 'button', textContent: t('Repeat'), disabled: !repeatable, onclick: run });
  const words = repeatable ? t('Runs it again with the same prompt, parameters and seed, as another version.') : t('It cannot be repeated as it was. {reason}', { reason: why });
  return el('div.tgw-repeat', {}, made, el('p.tgw-told', { textContent: words }));
}

// --- tokens ------------------------------------------------------------------------------------------------------------------------------

/** The tokens of a reply, tinted by their probability. `asks` {ask(position), resume(position, token)}. One stop of Tab; arrows move in it. */
class Tokens {
  constructor({ tokens, start }, text, asks) {
    [this.tokens, this.asks, this.at] = [tokens, asks, 0];
    const before = [...text].slice(0, start).join('');
    const made = tokens.map(([, piece, logprob], at) => {
      const token = document.createElement('span');
      token.className = `tgw-token p${level(logprob)}`;
      token.textContent = visible(piece);
      token.tabIndex = -1;
      token.setAttribute('role', 'button');
      token.dataset.at = at;
      return token;
    });
    this.line = el('div.tgw-tokens', { role: 'group', 'aria-label': t('Tokens'), dir: 'auto' }, before ? el('span.tgw-before', { textContent: before }) : null, ...made);
    this.spans = made;
    made[0].tabIndex = 0;
    this.status = el('p.tgw-status', { role: 'status' });
    this.found = el('div.tgw-alternatives', { hidden: true });
    const help = t('A token shows with what probability it was chosen. Click it, or press Enter, for what might have stood there.');
    this.el = el('section.tgw-tokenview', { 'aria-label': t('Tokens') }, el('p.tgw-told', { textContent: help }), legend(), this.line, this.status, this.found);
    this.listen();
  }

  listen() {
    const place = (e) => { const token = e.target.closest?.('[data-at]'); return token ? Number(token.dataset.at) : -1; };
    this.line.addEventListener('click', (e) => { if (place(e) >= 0) this.choose(place(e)); });
    this.line.addEventListener('pointerover', (e) => { if (place(e) >= 0) e.target.closest('[data-at]').title = this.describe(place(e)); });
    this.line.addEventListener('focusin', (e) => { if (place(e) >= 0) this.enter(place(e)); });
    this.line.addEventListener('keydown', (e) => this.key(e));
  }

  describe(at) {
    const [, text, logprob] = this.tokens[at];
    const chance = logprob === null ? t('probability not known') : percent(Math.exp(logprob));
    return t('“{text}”: {chance}, token {number} of {count}', { text: text.replaceAll('\n', '↵'), chance, number: number.format(at + 1), count: number.format(this.tokens.length) });
  }

  enter(at) {
    this.spans[this.at].tabIndex = -1;
    this.at = at;
    this.spans[at].tabIndex = 0;
    this.status.textContent = this.describe(at);
  }

  key(e) {
    const to = { ArrowRight: () => this.at + 1, ArrowLeft: () => this.at - 1, Home: () => 0, End: () => this.spans.length - 1, ArrowDown: () => this.beside(1), ArrowUp: () => this.beside(-1) }[e.key];
    if (to) { e.preventDefault(); this.spans[Math.max(0, Math.min(this.spans.length - 1, to()))].focus(); }
    if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); this.choose(this.at); }
  }

  /** The token in the next line (1) or the one before (-1), below or above this one. */
  beside(step) {
    const here = this.spans[this.at].getClientRects()[0];
    let found = this.at;
    for (let at = this.at + step, top = null; this.spans[at]; at += step) {
      const there = this.spans[at].getClientRects()[0];
      if (!there || Math.abs(there.top - here.top) < 4) continue;
      top ??= there.top;
      if (Math.abs(there.top - top) >= 4) break;
      found = at;
      if (step > 0 ? there.right > here.left : there.left <= here.left) break;
    }
    return found;
  }

  /** What might have stood at a place. */
  async choose(at) {
    this.enter(at);
    this.spans[this.chosen]?.classList.remove('chosen');
    this.chosen = at;
    this.spans[at].classList.add('chosen');
    this.found.hidden = false;
    this.found.replaceChildren(el('p.tgw-told', { textContent: t('Asking the model…') }));
    try {
      const { alternatives } = await this.asks.ask(at);
      if (at === this.chosen) this.offer(at, alternatives);
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      if (at === this.chosen) this.found.replaceChildren(el('p.tgw-said', { role: 'alert', textContent: error.message }));
    }
  }

  offer(at, alternatives) {
    const [id, text, logprob] = this.tokens[at];
    const all = alternatives.some(([other]) => other === id) || logprob === null ? alternatives : [...alternatives, [id, text, Math.exp(logprob)]];
    const lines = all.map(([other, words, probability]) => {
      const bar = el('i');
      bar.style.setProperty('--part', probability);
      const name = t('Continue from here with “{text}” ({percent})', { text: words.replaceAll('\n', '↵'), percent: percent(probability) });
      const line = el('button', { type: 'button', title: name, 'aria-label': name, onclick: () => this.asks.resume(at, other) },
        el('code', { textContent: visible(words).trimEnd() || visible(words), dir: 'auto' }), bar, el('span', { textContent: percent(probability) }));
      if (other === id) line.setAttribute('aria-current', 'true');
      return el('li', {}, line);
    });
    const close = button('no', t('Close'), () => this.close());
    this.found.replaceChildren(el('header', {}, el('strong', { textContent: t('What might have stood here') }), close),
      el('p.tgw-told', { textContent: t('Click one: another version goes on from here with it.') }), el('ol', {}, ...lines));
    (this.found.querySelector('ol [aria-current]') || this.found.querySelector('ol button') || close).focus({ preventScroll: true });
    this.spans[at].scrollIntoView({ block: 'nearest' });
  }

  close() {
    this.found.hidden = true;
    this.spans[this.chosen].classList.remove('chosen');
    this.spans[this.chosen].focus({ preventScroll: true });
    this.chosen = null;
  }
}

function legend() {
  const names = [...LEVELS.map((least) => `≥ ${100 * least} %`), `< ${100 * LEVELS.at(-1)} %`];
  return el('p.tgw-legend', {}, el('span', { textContent: t('Probability') }), ...names.map((name, at) => el(`span.tgw-token.p${at}`, { textContent: name })));
}
