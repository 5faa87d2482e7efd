/* Tables that scroll by themselves do so from the keyboard, too. The theme wraps them after the page is there. */
document$.subscribe(() => {
  setTimeout(() => {
    for (const wrap of document.querySelectorAll(".md-typeset__scrollwrap")) wrap.tabIndex = 0;
  }, 0);
});
