// Light or dark.
import { icon, button, memory } from './core.js';

export const theme = {
  preferred: matchMedia('(prefers-color-scheme: dark)'), setting: 'auto',
  build() {
    this.control = button('moon', 'Change between light and dark', () => {
      memory.set('tgw.theme', this.dark() ? 'light' : 'dark');
      this.apply();
    });
    this.preferred.addEventListener('change', () => this.apply());  // after Gradio's own listener, which was there before
    this.apply();
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
};
