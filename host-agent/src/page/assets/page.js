// Keeps the page as the server would render it now: an event of the host, or the time that
// passed, fetches the page again and takes over the parts that differ.
'use strict';

// Most characters of a log that are shown.
const LOG_MOST = 200000;
// Time between two fetches of the page for what no event tells: ages and figures.
const TICK_MS = 5000;
// A burst of events causes one fetch.
const SETTLE_MS = 150;
// A screen reader is not told more often.
const NEWS_MS = 3000;
const RETRY_MS = 3000;

const main = document.getElementById('main');
const say = (id, text) => {
  const place = document.getElementById(id);
  if (place && place.textContent !== text) place.textContent = text;
};

let fetching = false;
let again = false;
let settle = 0;

async function refresh() {
  if (fetching) {
    again = true;
    return;
  }
  fetching = true;
  try {
    const answer = await fetch(location.href, { cache: 'no-store' });
    if (!answer.ok) {
      say('connection', answer.status === 404 ? 'This is gone' : 'Signed out: open the address that serve printed');
      return;
    }
    const parsed = new DOMParser().parseFromString(await answer.text(), 'text/html');
    for (const part of document.querySelectorAll('[data-live]')) {
      const now = parsed.getElementById(part.id);
      if (now && now.innerHTML !== part.innerHTML) takeOver(part, now);
    }
  } catch {
    say('connection', 'Connection lost, trying again');
  } finally {
    fetching = false;
    if (again) {
      again = false;
      soon();
    }
  }
}

// How the element with the focus is found again.
const mark = (element) => element.getAttribute('href') || element.getAttribute('data-dialog');

// Keeps the focus, what is folded open, and a question that waits for its answer.
function takeOver(part, now) {
  if (part.querySelector('dialog[open]')) return;
  const focused = part.contains(document.activeElement) ? mark(document.activeElement) : null;
  const open = [...part.querySelectorAll('details')].map((it) => it.open);
  part.replaceChildren(...now.childNodes);
  part.querySelectorAll('details').forEach((it, index) => { it.open = Boolean(open[index]); });
  if (focused) {
    const same = [...part.querySelectorAll('a[href], [data-dialog]')].find((it) => mark(it) === focused);
    if (same) same.focus({ preventScroll: true });
  }
}

function soon() {
  clearTimeout(settle);
  settle = setTimeout(refresh, SETTLE_MS);
}

let source = null;
let told = 0;
let last = null;

function listen() {
  const address = new URL(main.dataset.stream, location.href);
  if (last !== null) address.searchParams.set('after', last);
  source = new EventSource(address);
  source.onopen = () => say('connection', 'Live');
  source.onerror = () => say('connection', source.readyState === EventSource.CLOSED
    ? 'Signed out: open the address that serve printed'
    : 'Connection lost, trying again');
  source.onmessage = (message) => {
    last = message.lastEventId;
    soon();
    if (Date.now() - told > NEWS_MS) {
      told = Date.now();
      const event = JSON.parse(message.data);
      say('news', [event.service, event.instance, event.text].filter(Boolean).join(' '));
    }
  };
}

// Control characters, without tab and line feed, and the escape sequences of terminals.
const UNPRINTABLE = /\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]/g;

let following = null;

async function follow() {
  const place = document.getElementById('log');
  if (!place) return;
  const stop = new AbortController();
  following = stop;
  while (!stop.signal.aborted) {
    try {
      const answer = await fetch(place.dataset.log, { signal: stop.signal, cache: 'no-store' });
      if (!answer.ok) {
        say('log-state', 'There is no log: the instance does not run');
        return;
      }
      say('log-state', 'Following');
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = '';
      let painted = true;
      const paint = () => {
        painted = true;
        const atEnd = place.scrollHeight - place.scrollTop - place.clientHeight < 30;
        place.textContent = text;
        if (atEnd) place.scrollTop = place.scrollHeight;
      };
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        text = (text + value.replace(UNPRINTABLE, '')).slice(-LOG_MOST);
        if (painted) {
          painted = false;
          requestAnimationFrame(paint);
        }
      }
      say('log-state', 'The log has ended');
    } catch {
      if (stop.signal.aborted) return;
      say('log-state', 'Connection lost, trying again');
    }
    await new Promise((done) => setTimeout(done, RETRY_MS));
  }
}

// A browser has six connections to a host: pages that nobody sees keep none.
function show() {
  if (document.hidden) {
    if (source) source.close();
    if (following) following.abort();
    source = null;
    return;
  }
  if (source) return;
  refresh();
  listen();
  follow();
}

document.addEventListener('click', (event) => {
  const button = event.target.closest('[data-dialog]');
  if (button) document.getElementById(button.dataset.dialog).showModal();
});

if (main.dataset.stream) {
  document.addEventListener('visibilitychange', show);
  window.addEventListener('pageshow', show);
  window.addEventListener('pagehide', () => {
    if (source) source.close();
    if (following) following.abort();
    source = null;
  });
  setInterval(() => { if (!document.hidden) refresh(); }, TICK_MS);
}
