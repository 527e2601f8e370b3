// Of every HTML component: buttons with `data-copy` copy it, those with `data-pick` tell the server which they are.
element.addEventListener('click', async (event) => {
  const pick = event.target.closest('[data-pick]');
  if (pick) { trigger('pick', {index: Number(pick.dataset.pick)}); return; }
  const button = event.target.closest('[data-copy]');
  if (!button) return;
  const text = button.dataset.copy;
  try {
    await navigator.clipboard.writeText(text);
  } catch (error) {  // no permission, or a page without https
    const field = document.createElement('textarea');
    field.value = text;
    document.body.appendChild(field);
    field.select();
    document.execCommand('copy');
    field.remove();
  }
  button.classList.add('copied');
  const said = button.querySelector('[data-said]');
  const before = said ? said.textContent : '';
  if (said) said.textContent = 'Copied';
  setTimeout(() => { button.classList.remove('copied'); if (said) said.textContent = before; }, 1500);
});
