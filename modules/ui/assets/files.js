// Conversations from files and into files.
import { ROOT, PHONE, ServerError, el, attempt, toast, t } from './core.js';
import { sidebar } from './sidebar.js';
import { filters } from './filters.js';

const KINDS = '.json,.jsonl,application/json';

export const files = {
  build() {
    this.picker = el('input', { type: 'file', multiple: true, accept: KINDS, hidden: true, onchange: () => this.picked() });
    this.text = el('span');
    this.bar = el('progress', { 'aria-label': t('Import') });
    this.line = el('div.tgw-importing', { hidden: true, role: 'status' }, this.text, this.bar);
    return el('div', {}, this.picker, this.line);
  },

  choose() { this.picker.click(); },

  picked() {
    const found = [...this.picker.files];
    this.picker.value = '';  // the same file may be chosen again
    this.import(found);
  },

  /** Let files be dropped on `target`. */
  takeDropped(target) {
    const ours = (e) => e.dataTransfer.types.includes('Files');
    const over = el('div.tgw-drop', { hidden: true, textContent: t('Drop files to import conversations') });
    target.append(over);
    target.addEventListener('dragover', (e) => { if (ours(e)) { e.preventDefault(); over.hidden = false; } });
    target.addEventListener('dragleave', (e) => { if (!target.contains(e.relatedTarget)) over.hidden = true; });
    target.addEventListener('drop', (e) => {
      over.hidden = true;
      if (ours(e)) { e.preventDefault(); this.import([...e.dataTransfer.files]); }
    });
  },

  /** Import files one after another, say what came of it, and open the first conversation. */
  async import(found) {
    if (!found.length || !this.line.hidden) return;
    const made = { first: null, count: 0, failed: [] };
    this.line.hidden = false;
    try {
      for (const [n, file] of found.entries()) {
        this.text.textContent = t('Importing {name} ({n} of {count})', { name: file.name, n: n + 1, count: found.length });
        this.bar.value = n / found.length;
        await this.importOne(file, made);
      }
    } finally {
      this.line.hidden = true;  // else no other file could be imported
    }
    if (made.first) await this.show(made.first);
    if (made.count) toast(t('{count} imported', { count: made.count }), 'done');
    if (made.failed.length) toast(made.failed.join('\n'));
  },

  async importOne(file, made) {
    try {
      const data = await file.arrayBuffer().catch(() => { throw new ServerError(t('This file cannot be read. A folder has to be opened, and its files chosen.')); });
      const answer = await (await post(`chat/import?name=${encodeURIComponent(file.name)}`, data, 'application/octet-stream')).json();
      made.first ??= answer.conversations[0] ?? null;
      made.count += answer.count;
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      made.failed.push(error.message.includes(file.name) ? error.message : `${file.name}: ${error.message}`);
    }
  },

  async show(id) {
    sidebar.field.value = '';
    if (filters.active) filters.clear();
    await sidebar.load();
    sidebar.open({ id });
    if (!PHONE.matches) sidebar.items.get(id)?.scrollIntoView({ block: 'nearest' });
  },

  /** Save conversations (null: all) as a file of the form "json" or "markdown". */
  async export(ids, form) {
    const answer = await attempt(() => post('chat/export', JSON.stringify({ conversations: ids, form }), 'application/json'));
    if (!answer) return;
    const name = /filename\*=UTF-8''([^;]+)/.exec(answer.headers.get('Content-Disposition') || '')?.[1];
    const address = URL.createObjectURL(await answer.blob());
    const link = el('a', { href: address, download: name ? decodeURIComponent(name) : `conversations.${form === 'json' ? 'json' : 'md'}` });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 60000);  // the browser may still be asking where to save it
  },
};

/** Post what is not, or does not answer, JSON. */
async function post(path, body, type) {
  let response;
  try {
    response = await fetch(new URL(path, ROOT), { method: 'POST', credentials: 'same-origin', headers: { 'Content-Type': type, 'X-TGW': '1' }, body });
  } catch {
    throw new ServerError(t('The server cannot be reached. Nothing is lost: try again when it is back.'), 'Offline');
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw new ServerError(error?.message || t('The server answered with status {status}.', { status: response.status }), error?.code, response.status);
}
