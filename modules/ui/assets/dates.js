// Under which heading a conversation stands in the list.
import { t } from './core.js';

const FIRST_MONTH = 10 ** 6;  // months stand below everything else: their order counts down from here

/** The group of `item`: {key, order, label()}. A lower order stands above. `now` is a Date. */
export function groupOf(item, now = new Date()) {
  if (item.incognito) return { key: 'incognito', order: 0, label: () => t('Incognito') };
  if (item.pinned) return { key: 'pinned', order: 1, label: () => t('Pinned') };
  const since = (days) => item.updated * 1000 >= new Date(now.getFullYear(), now.getMonth(), now.getDate() - days).getTime();
  if (since(0)) return { key: 'today', order: 2, label: () => t('Today') };
  if (since(1)) return { key: 'yesterday', order: 3, label: () => t('Yesterday') };
  if (since(7)) return { key: 'week', order: 4, label: () => t('Previous 7 days') };
  if (since(30)) return { key: 'thirty', order: 5, label: () => t('Previous 30 days') };
  const date = new Date(item.updated * 1000);
  const month = date.getFullYear() * 12 + date.getMonth();
  return { key: `month-${month}`, order: FIRST_MONTH - month, label: () => written(date, { month: 'long', year: 'numeric' }) };
}

/** What is found has the order of the search, and no heading. */
export const FOUND = { key: 'found', order: 0, label: () => '' };

/** A date in the language of the page, with a capital letter. */
export function written(date, parts) {
  const text = new Intl.DateTimeFormat(document.documentElement.lang || 'en', parts).format(date);
  return text.charAt(0).toUpperCase() + text.slice(1);
}
