// Drives a headless Chromium over the page of a running `host-agent serve`, as a person would.
// Prints the time of the first paint; fails with what is wrong.
// Usage: node drive.cjs SETTINGS.json     (tests/native/page.rs writes them)
'use strict';

const assert = require('node:assert/strict');
const { execFileSync } = require('node:child_process');
const fs = require('node:fs');
const http = require('node:http');
const { chromium } = require('playwright-core');

const settings = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const axe = fs.readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');
const limit = settings.limit_ms;
const { origin } = new URL(settings.url);
const path = (...parts) => `${origin}/${parts.map(encodeURIComponent).join('/')}`;
const PAGES = {
  overview: path(''),
  events: path('events'),
  service: path('services', settings.service),
  hostile: path('services', settings.hostile),
  instance: path('services', settings.service, 'instances', settings.instance),
};

async function until(what, condition) {
  const end = Date.now() + limit;
  for (;;) {
    if (await condition()) return;
    assert.ok(Date.now() < end, `not in time: ${what}`);
    await new Promise((done) => setTimeout(done, 50));
  }
}

/// A context whose pages must not log an error nor ask another host.
async function watched(browser, faults, options) {
  const context = await browser.newContext(options);
  context.setDefaultTimeout(limit);
  context.on('console', (message) => {
    if (message.type() === 'error' || message.type() === 'warning') faults.push(message.text());
  });
  context.on('weberror', (error) => faults.push(String(error.error())));
  context.on('request', (request) => {
    if (new URL(request.url()).origin !== origin) faults.push(`outside: ${request.url()}`);
  });
  return context;
}

async function accessible(page, what) {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run());
  const found = violations.map((it) => `${it.id}: ${it.nodes.map((node) => node.html).join(' ')}`);
  assert.deepEqual(found, [], `accessibility of ${what}`);
}

async function live(page) {
  await page.locator('#connection', { hasText: 'Live' }).waitFor();
}

async function gateIsShut(browser) {
  const context = await browser.newContext();
  const page = await context.newPage();
  const answer = await page.goto(origin);
  assert.equal(answer.status(), 401);
  assert.ok((await page.textContent('main')).includes('host-agent serve printed'));
  const wrong = await page.goto(`${origin}/login?token=${'0'.repeat(32)}`);
  assert.equal(wrong.status(), 401);
  await context.close();
}

/// What only a hostile site or program sends, with the cookie of a session.
async function forgeriesAreRefused(context, csrf) {
  const [cookie] = await context.cookies();
  assert.ok(cookie.httpOnly && cookie.sameSite === 'Strict', JSON.stringify(cookie));
  const ask = (method, where, headers, body) => new Promise((done, failed) => {
    const request = http.request(where, {
      method,
      headers: { cookie: `${cookie.name}=${cookie.value}`, ...headers },
    }, (answer) => { answer.resume(); done(answer.statusCode); });
    request.on('error', failed);
    request.end(body);
  });
  const form = { 'content-type': 'application/x-www-form-urlencoded' };
  const remove = `${PAGES.service}/delete`;
  assert.equal(await ask('GET', origin, {}), 200);
  assert.equal(await ask('GET', origin, { host: 'evil.example' }), 421);
  assert.equal(await ask('POST', remove, { ...form, origin }, 'csrf=0'), 403);
  assert.equal(await ask('POST', remove, { ...form, origin: 'http://evil.example' }, `csrf=${csrf}`), 403);
  assert.equal(await ask('DELETE', path('v1', 'services', settings.service), { origin }), 403);
  assert.equal(await ask('GET', path('v1', 'services'), { cookie: '' }), 401);
}

async function looksRight(browser, faults, scheme) {
  const context = await watched(browser, faults, {
    colorScheme: scheme,
    viewport: { width: 360, height: 740 },
    reducedMotion: 'reduce',
  });
  const page = await context.newPage();
  await page.goto(settings.url);
  for (const [name, address] of Object.entries(PAGES)) {
    await page.goto(address);
    await live(page);
    const [wide, width] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
    assert.ok(wide <= width, `${name} is ${wide} wide on a screen of ${width}`);
    await accessible(page, `${name}, ${scheme}`);
    if (settings.pictures) await page.screenshot({ path: `${settings.pictures}/${name}-${scheme}.png`, fullPage: true });
  }
  await page.goto(PAGES.service);
  await page.getByRole('button', { name: 'Delete…' }).click();
  await accessible(page, `a dialog, ${scheme}`);
  if (settings.pictures) await page.screenshot({ path: `${settings.pictures}/dialog-${scheme}.png` });
  await context.close();
}

async function keyboard(page) {
  await page.goto(PAGES.service);
  await page.keyboard.press('Tab');
  assert.equal(await page.evaluate(() => document.activeElement.className), 'skip');
  assert.ok((await page.locator('.skip').boundingBox()).x >= 0, 'the skip link is seen');
  await page.keyboard.press('Enter');
  await page.keyboard.press('Tab');
  assert.equal(await page.evaluate(() => document.activeElement.textContent), 'Stop…');
  await page.keyboard.press('Enter');
  await page.getByRole('dialog').waitFor();
  assert.equal(await page.evaluate(() => document.activeElement.textContent), 'Cancel');
  await page.keyboard.press('Escape');
  await page.getByRole('dialog').waitFor({ state: 'hidden' });
  assert.equal(await page.evaluate(() => document.activeElement.textContent), 'Stop…');
}

async function follows(page) {
  await page.goto(PAGES.instance);
  const log = page.getByRole('log');
  await page.locator('#log-state', { hasText: 'Following' }).waitFor();
  const line = '<img src=x onerror=alert(1)></pre><script>alert(2)</script> line one';
  fs.appendFileSync(settings.log, `${line}\n`);
  await until('the first line', async () => (await log.textContent()).includes(line));
  fs.appendFileSync(settings.log, '\x1b[31mline two\x1b[0m\n');
  await until('the second line', async () => (await log.textContent()).endsWith('\nline two\n'));
  assert.equal(await page.locator('main img, main script').count(), 0);
  // States and figures are shown, and as text too.
  const strip = page.locator('.strip');
  assert.match(await strip.getAttribute('aria-label'), /now; \d+ states since /);
  assert.ok(await strip.locator('rect').count() > 0);
}

async function main() {
  const browser = await chromium.launch({
    executablePath: settings.browser,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
      '--disable-background-networking', '--disable-component-update', '--disable-sync'],
  });
  const faults = [];
  await gateIsShut(browser);
  const context = await watched(browser, faults, {});
  const page = await context.newPage();
  await page.goto(settings.url);
  assert.equal(page.url(), `${origin}/`);
  await live(page);

  // First paint of a page whose files are in the browser, and with nothing in it.
  const entry = () => page.evaluate(() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime);
  const paint = async () => {
    let time;
    await until('a paint', async () => (time = await entry()) !== undefined);
    return time;
  };
  const times = [await paint()];
  for (let count = 0; count < 10; count++) {
    await page.reload();
    times.push(await paint());
  }
  times.sort((a, b) => a - b);
  // With room for a busy machine: 60 ms are usual.
  assert.ok(times[5] < 300, `the first paint takes ${times[5]} ms`);
  console.log(`first paint: ${times[5].toFixed(0)} ms (median of 11), ${times[10].toFixed(0)} ms at most`);

  await until('figures', async () => await page.locator('.plot polyline').count() > 0);

  // Names of others are text.
  await page.getByRole('link', { name: settings.hostile, exact: true }).click();
  assert.equal(await page.textContent('h1'), `Service ${settings.hostile}`);
  assert.equal(await page.locator('main script').count(), 0);

  // What another client does is seen without a reload.
  await page.goto(PAGES.overview);
  await live(page);
  const old = page.getByRole('link', { name: settings.old, exact: true });
  await old.waitFor();
  await page.evaluate(() => { window.same = true; });
  execFileSync(settings.program, ['service', 'delete', settings.old, '--yes', '--wait'], { stdio: 'pipe' });
  await old.waitFor({ state: 'detached' });
  assert.ok(await page.evaluate(() => window.same), 'the page was not loaded again');

  await follows(page);
  await keyboard(page);
  for (const scheme of ['light', 'dark']) await looksRight(browser, faults, scheme);
  await page.goto(PAGES.service);
  await forgeriesAreRefused(context, await page.getAttribute('input[name=csrf]', 'value'));

  // Actions, each after its confirmation.
  await page.getByRole('button', { name: 'Stop…' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Stop', exact: true }).click();
  await page.locator('#state', { hasText: 'stopped is wanted' }).waitFor();
  await page.getByRole('button', { name: 'Start…' }).waitFor();
  await page.locator('#operations', { hasText: 'stop, revision 1' }).waitFor();
  await page.getByRole('button', { name: 'Delete…' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Delete', exact: true }).click();
  await page.waitForURL(`${origin}/`);
  await page.getByRole('link', { name: settings.service, exact: true }).waitFor({ state: 'detached' });
  await page.goto(PAGES.hostile);
  await page.getByRole('button', { name: 'Delete…' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Delete', exact: true }).click();
  await page.getByText('No services.').waitFor();
  assert.deepEqual(faults, [], 'the browser has nothing to complain of');
  await browser.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
