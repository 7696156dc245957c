// The values in effect for the conversation shown, as the server holds them.
import { later, api, toast, attempt, shownLast, t } from './core.js';
import { chat } from './chat.js';
import { ahead } from './composer.js';
import { theme } from './theme.js';

const TOLD = 1000;  // milliseconds in which Gradio has told that a control was changed

document.addEventListener('input', ({ target }) => {
  const [, name] = /(?:^|\s)knob-(\S+)/.exec(target.closest?.('[class*="knob-"]')?.className) || [];
  if (name) session.touched[name] = performance.now();
}, true);

/** Changes are gathered for a moment and posted in order, to the conversation in which they were made; a turn waits for them. */
export const session = {
  id: null, revision: 0, values: {}, shown: null, all: false, posted: Promise.resolve(),
  /** Changes not posted yet; those posted and not answered yet. */
  pending: {}, posting: {},
  /** When somebody changed a control, until Gradio tells it (`set`), a little later. */
  touched: {},
  /** Whether the controls are there; how often they had to be painted, and whether they show the last of that. */
  mounted: false, paints: 0,
  get painted() { return this.mounted && this.shown !== null && shownLast('tgw-paint-', this.paints); },
  set(name, value) {
    this.pending[name] = value;
    delete this.touched[name];
    this.soon();
  },
  soon: later(150, () => session.flush()),
  flush() {
    this.soon.cancel();
    const [changes, id] = [this.pending, this.id];
    this.pending = {};
    if (!Object.keys(changes).length) return this.posted;
    Object.assign(this.posting, changes);
    this.posted = this.posted.then(() => attempt(() => this.patch(changes, id)));
    return this.posted;
  },
  path(id = this.id) { return `chat/session${id ? `?conversation=${encodeURIComponent(id)}` : ''}`; },
  async patch(changes, id) {
    try {
      const { revision } = await api('PATCH', this.path(id), changes);
      if (id !== this.id) return;
      this.take(revision, { ...this.values, ...changes });
      if (!id && ['mode', 'greeting', 'name1', 'name2'].some((name) => name in changes)) this.read();  // a new chat greets otherwise now
    } catch (error) {
      this.repaint(true);
      throw error;
    } finally {
      for (const [name, value] of Object.entries(changes)) if (this.posting[name] === value) delete this.posting[name];
    }
  },
  take(revision, values) {
    this.revision = revision;
    this.values = values;
    this.shown = JSON.stringify(values);
    theme.style?.(values.chat_style);
    ahead.soon();
  },
  /** The page shows conversation `id` (null: a new one), in which these values are in effect; the controls show them. */
  adopt(id, revision, values) {
    const other = id !== this.id && this.shown !== null;  // before the first one, what was changed belongs to it
    if (other) {
      this.flush();
      this.posting = {};
    }
    this.id = id;
    const differs = JSON.stringify(values) !== this.shown;
    this.take(revision, values);
    if (differs) this.repaint(other);
  },
  /** Let the controls show what is in effect; with `all`, also those that somebody is changing at this moment. */
  repaint(all = false) {
    this.all ||= all;
    this.paints += 1;
    if (this.mounted) document.getElementById('tgw-repaint').click();
  },
  repaintSoon: later(0, () => { if (session.shown !== null) session.repaint(); }),
  /** Gradio's controls are there. */
  ready() {
    this.mounted = true;
    if (this.shown !== null) this.repaint();
  },
  /** Somebody is changing the control of this name: what is in effect would undo it. */
  changing(name) {
    if (this.all) return false;
    const typed = document.activeElement?.closest(`.knob-${CSS.escape(name)} :is(textarea, input:not([type=number], [type=range], [type=checkbox], [type=radio]))`);
    return Boolean(typed) || name in this.pending || name in this.posting || performance.now() - this.touched[name] < TOLD;
  },
  /** Ask the server for the values in effect. */
  async read(id = this.id) {
    const found = await api('GET', this.path(id));
    if (id !== this.id && this.id !== undefined && id !== chat.id) return found.values;  // another chat is shown by now
    this.adopt(id, found.revision, found.values);
    if (!id) chat.greet(found.greeting);
    return found.values;
  },
  async save() {
    await this.flush();
    if (await attempt(() => api('POST', 'chat/session/save'))) toast(t('Saved: new browsers begin with these values.'), 'done');
  },
  /** Post a turn. The values may have been changed elsewhere (409): then those are adopted, once. */
  async turn(path, body) {
    await this.flush();
    try {
      return await api('POST', path, { ...body, revision: this.revision });
    } catch (error) {
      if (error.code !== 'StaleRevision') throw error;
      await this.read(body.conversation ?? null);
      toast(t('The parameters were changed elsewhere; those are used now.'), 'done');
      return api('POST', path, { ...body, revision: this.revision });
    }
  },
};
