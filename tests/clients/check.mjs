// Runs one check after the other and prints a line of JSON for each.
export const baseURL = process.env.LP_BASE, apiKey = process.env.LP_KEY, model = 'demo/tiny';

export async function check(name, run) {
  try {
    await run();
    console.log(JSON.stringify({ name, ok: true }));
  } catch (error) {
    const said = error.responseBody ?? error.message ?? String(error);
    console.log(JSON.stringify({ name, ok: false, error: `${error.name}: ${said}`.slice(0, 500) }));
  }
}

export function expect(holds, what) {
  if (!holds) throw new Error(`unexpected: ${JSON.stringify(what)}`);
}

export async function refused(promise, status) {
  const error = await promise.then(() => undefined, (caught) => caught);
  expect(error?.status === status, { status: error?.status, message: error?.message });
}
