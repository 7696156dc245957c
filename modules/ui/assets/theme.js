// What the page looks like: light or dark, the style of the conversation, the panel beside it.
import { ROOT, el, icon, button, memory, root, t, toast } from './core.js';
import { model } from './model.js';
import { panel } from './panel.js';

export const theme = {
  preferred: matchMedia('(prefers-color-scheme: dark)'), setting: 'auto', sheet: null,
  build() {
    this.control = button('moon', t('Change between light and dark'), () => {
      memory.set('tgw.theme', this.dark() ? 'light' : 'dark');
      this.apply();
    });
    this.preferred.addEventListener('change', () => this.apply());  // after Gradio's own listener, which was there before
    this.apply();
    panel.build();
    return this.control;
  },
  dark() {
    const chosen = memory.get('tgw.theme') || { on: 'dark', off: 'light' }[this.setting];
    return chosen ? chosen === 'dark' : this.preferred.matches;
  },
  apply() {
    const dark = this.dark();
    document.body.classList.toggle('dark', dark);
    document.documentElement.style.colorScheme = dark ? 'dark' : 'light';
    this.control.replaceChildren(icon(dark ? 'sun' : 'moon'));
  },

  /** Other values may be in effect: show the conversation in the style `name`, and the controls that matter now. */
  style(name) {
    model.rules();
    if (!name || name === root.dataset.chatStyle) return;
    root.dataset.chatStyle = name;
    const [former, sheet] = [this.sheet, el('link', { rel: 'stylesheet', href: new URL(`styles/${encodeURIComponent(name)}.css`, ROOT).href })];
    this.sheet = sheet;
    sheet.onload = () => former?.remove();  // not before, so that the page does not change twice
    sheet.onerror = () => { former?.remove(); toast(t('There is no style “{name}”. Choose another one.', { name })); };
    document.head.append(sheet);
  },
};
