// What is typed, and the chat that is opened, told to the server, so that the model has read them before Send. Whether that works is no matter.
import { later, api } from './core.js';
import { session } from './session.js';
import { chat } from './chat.js';
import { composer } from './composer.js';
import { model } from './model.js';

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
    const idle = !this.telling && !this.useless && !document.hidden && !chat.busy && !chat.running && !composer.impersonating;
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
