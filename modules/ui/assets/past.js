// What was sent from this browser, newest first: ↑ in an empty box brings it back.
import { memory } from './core.js';

const MOST = 50;
const LONGEST = 10000;  // characters

export const past = {
  at: -1, typed: '',

  get list() { try { return JSON.parse(memory.get('tgw.sent') || '[]'); } catch { return []; } },

  add(text) {
    this.leave();
    if (text.length > LONGEST) return;
    const list = [text, ...this.list.filter((each) => each !== text)].slice(0, MOST);
    while (!memory.set('tgw.sent', JSON.stringify(list)) && list.length > 1) list.splice(Math.ceil(list.length / 2));
  },

  /** Something else than walking through the texts happened. */
  leave() { this.at = -1; },

  /** Whether there is one `step` (1: an older one, -1: a newer one) from what the box shows. */
  has(step, shown) { return step > 0 ? (this.at >= 0 || !shown) && this.at + 1 < this.list.length : this.at >= 0; },

  /** The text one step on; beyond the newest what was typed. */
  walk(step, shown) {
    if (this.at < 0) this.typed = shown;
    this.at += step;
    return this.at < 0 ? this.typed : this.list[this.at];
  },
};
