// Text that was typed and not sent. The server keeps it, so that it is there on another device; what it could not be told waits in this browser.
import { ROOT, later, api, memory } from './core.js';

const MOST = 400000;  // characters that the server takes
const BEACON = 60000;  // bytes that a browser sends for a page that is closed

/** Incognito text stays in the page. */
export const secret = (key) => Boolean(key?.startsWith('incognito-'));

/** Texts that the server does not have yet, of the newest conversations, so that neither a reload nor a crash takes them. */
const waiting = {
  name: (key) => `tgw.draft:${key || 'new'}`,
  read(key) { return secret(key) ? '' : memory.get(this.name(key)) || ''; },
  write(key, text) {
    if (secret(key)) return;
    const name = this.name(key);
    let known = [];
    try { known = JSON.parse(memory.get('tgw.drafts') || '[]').filter((each) => each !== name); } catch { /* begin anew */ }
    if (text) known.unshift(name);
    known.splice(20).forEach((old) => memory.set(old, ''));
    while (!memory.set(name, text) && known.length > 1) memory.set(known.pop(), '');
    memory.set('tgw.drafts', JSON.stringify(known));
  },
};

/** Texts in this browser are those of `user`, the name of a login ('': there are none). Another one's are forgotten; whether there was another one. */
export function keptFor(user) {
  const former = memory.get('tgw.user');
  memory.set('tgw.user', user);
  if (!former || former === user) return false;
  memory.forget(/^tgw\.(draft|sent|queue)/);
  drafts.texts.clear();
  return true;
}

/** Keys are ids of conversations, null for a new one. */
export const drafts = {
  texts: new Map(), told: new Map(), telling: false,

  soon: later(700, () => drafts.tell()),
  again: later(5000, () => drafts.tell()),

  /** What this page knows of a draft, before the server has said what it holds. */
  known(key) { return this.texts.get(key) ?? waiting.read(key); },

  /** The server holds `text`. Answers the draft: what was typed here and not told yet comes first. */
  take(key, text) {
    const draft = this.dirty(key) ? this.texts.get(key) : waiting.read(key) || text;
    if (!this.telling) this.told.set(key, text);
    this.keep(key, draft);
    return draft;
  },

  dirty(key) { return this.texts.has(key) && this.texts.get(key) !== (this.told.get(key) ?? ''); },

  keep(key, text) {
    if (!this.texts.has(key) && !text && !this.told.get(key)) { waiting.write(key, ''); return; }
    this.texts.set(key, text);
    if (!this.dirty(key)) { waiting.write(key, ''); return; }
    waiting.write(key, text);
    this.soon();
  },

  /** What the server has to be told. */
  get due() { return [...this.texts].filter(([key, text]) => !secret(key) && this.dirty(key) && text.length <= MOST); },

  async tell() {
    if (this.telling) return;
    this.telling = true;
    let away = false;
    for (const [conversation, text] of this.due) {
      const error = await api('PUT', 'chat/draft', { conversation, text }).then(() => null, (problem) => problem);
      if (error && (error.status >= 500 || !error.status)) { away = true; break; }
      this.told.set(conversation, text);  // also if it was refused: then asking again is of no use
      if (!error && this.texts.get(conversation) === text) waiting.write(conversation, '');
    }
    this.telling = false;
    if (away) this.again(); else if (this.due.length) this.soon();
  },

  /** The page goes away: nobody will hear the answer, so the texts stay in this browser too. */
  leave() {
    for (const [conversation, text] of this.due) {
      const body = JSON.stringify({ conversation, text });
      waiting.write(conversation, text);
      if (body.length * 3 > BEACON) continue;
      fetch(new URL('chat/draft', ROOT), {
        method: 'PUT', keepalive: true, credentials: 'same-origin', headers: { 'Content-Type': 'application/json', 'X-TGW': '1' }, body,
      }).catch(() => {});
    }
  },
};
