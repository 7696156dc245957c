// This browser's parameters, as the server holds them.
import { later, api, toast, attempt } from './core.js';
import { ahead } from './composer.js';

/** Changes are gathered for a moment and posted in order; a turn waits for them and carries the newest revision. */
export const session = {
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
