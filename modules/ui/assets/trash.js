// What was deleted: back again, or gone for good.
import { icon, el, api, attempt, t } from './core.js';
import { restore } from './acts.js';
import { sidebar } from './sidebar.js';
import { sheet, twice } from './manage.js';
import { written } from './dates.js';

/** Show the trash. */
export async function openTrash() {
  const found = await attempt(() => api('GET', 'chat/trash'));
  if (!found) return;
  const list = el('ul.tgw-lines');
  const empty = el('button', { type: 'button' }, icon('bin'), el('span', { textContent: t('Empty the trash') }));
  const ends = el('div.tgw-ends', {}, empty);
  const shown = sheet(t('Trash'), el('p.tgw-dim', { textContent: t('What is deleted stays here for 30 days.') }), list, ends);
  const look = () => {
    ends.hidden = !list.querySelector('.tgw-line');
    if (!list.childElementCount) list.append(el('li.tgw-none', { textContent: t('The trash is empty.') }));
  };
  list.append(...found.items.map((item) => line(item, shown, look)));
  twice(empty, () => t('Click again: what is here will be gone for good'), async () => {
    if (!(await shown.run(() => api('DELETE', 'chat/trash')))) return;
    list.textContent = '';
    look();
    shown.el.querySelector('header button').focus();
  });
  look();
}

/** One deleted thing. What was restored stays shown, to be opened. */
function line(item, shown, look) {
  const when = written(new Date(item.removed * 1000), { day: 'numeric', month: 'short', hour: 'numeric', minute: 'numeric' });
  const what = item.kind === 'messages' ? t('Messages of “{title}”', { title: item.title }) : item.title;
  const back = el('button', { type: 'button', 'aria-label': t('Restore {title}', { title: what }), textContent: t('Restore') });
  const row = el('li.tgw-line', {}, icon(item.kind === 'messages' ? 'pen' : 'chat'), el('span', { dir: 'auto' }, what, el('small', { textContent: when })), back);
  back.onclick = async () => {
    back.disabled = true;
    const restored = await restore([item.undo], null, shown.run);
    back.disabled = false;
    if (!restored) return;
    row.className = 'tgw-restored';  // it is no longer in the trash
    const open = el('button', { type: 'button', textContent: t('Open'), onclick: () => { shown.close(); sidebar.open({ id: restored[0] }); } });
    back.replaceWith(open);
    open.focus();
    look();
  };
  return row;
}
