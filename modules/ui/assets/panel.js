// The panel at the right of the chat.
export const panel = { build() { return []; }, toggle() {} };
