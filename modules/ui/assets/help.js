// The help sheet: all keys, and all commands of the box, from the table in commands.js.
import { el, dialog, t } from './core.js';
import { commands } from './commands.js';

const MAC = /Mac|iPhone|iPad/.test(navigator.userAgent);
const SIGNS = { ArrowUp: '↑', ArrowDown: '↓', ArrowLeft: '←', ArrowRight: '→', Escape: 'Esc' };

function keyed(keys) {
  return el('span.tgw-keys', {}, ...keys.split('+').map((each) => el('kbd', { textContent: (MAC && each === 'Ctrl' && '⌘') || SIGNS[each] || each })));
}

function rows(list, first) {
  return el('dl.tgw-keysheet', {}, ...list.map((each) => el('div', {}, el('dt', {}, first(each)), el('dd', { textContent: each.label }))));
}

export function help() {
  const told = commands().filter((each) => each.label);
  const slashed = (each) => el('span', {}, el('code', { textContent: `/${each.name}` }), each.argument ? el('em', { textContent: ` ${each.argument}` }) : '');
  dialog(t('Keys and commands'),
    el('h3', { textContent: t('Keys') }), rows(told.filter((each) => each.keys), (each) => keyed(each.keys)),
    el('h3', { textContent: t('Typed at the beginning of a message') }), rows(told.filter((each) => each.name), slashed),
    el('p', { textContent: t('A prompt of the library is there by its name too. What is no command is sent as a message; Esc closes the list.') }));
}
