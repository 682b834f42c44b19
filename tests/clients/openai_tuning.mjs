// The package `openai`: files and fine-tuning jobs.
import OpenAI, { toFile } from 'openai';
import { apiKey, baseURL, check, expect, refused } from './check.mjs';

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const data = '{"messages": []}\n'.repeat(12);
let file, job;

const all = async (list) => {
  const found = [];
  for await (const item of list) found.push(item.id);
  return found;
};

await check('a file is uploaded with an expiry', async () => {
  const sent = await toFile(Buffer.from(data), 'train.jsonl');
  file = await client.files.create({ file: sent, purpose: 'fine-tune', expires_after: { anchor: 'created_at', seconds: 3600 } });
  expect(file.bytes === data.length && file.expires_at === file.created_at + 3600, file);
});
await check('files are retrieved, read and listed in pages', async () => {
  expect((await client.files.retrieve(file.id)).filename === 'train.jsonl', file);
  expect((await (await client.files.content(file.id)).text()) === data, 'content');
  const second = await client.files.create({ file: await toFile(Buffer.from(data), 'b.jsonl'), purpose: 'fine-tune' });
  const ids = await all(client.files.list({ limit: 1 }));
  expect(ids.length === 2 && ids.includes(file.id) && ids.includes(second.id), ids); // both of one second, maybe
});
await check('a job is created and retrieved', async () => {
  const method = { type: 'supervised', supervised: { hyperparameters: { n_epochs: 2 } } };
  job = await client.fineTuning.jobs.create({ model: 'tiny', training_file: file.id, suffix: 'npm', method, metadata: { a: 'b' } });
  expect(job.status === 'validating_files' && job.hyperparameters.n_epochs === 2, job);
  expect((await client.fineTuning.jobs.retrieve(job.id)).metadata.a === 'b', job);
});
await check('jobs, events and checkpoints are listed in pages', async () => {
  expect((await all(client.fineTuning.jobs.list({ limit: 1 }))).join() === job.id, 'jobs');
  expect((await all(client.fineTuning.jobs.listEvents(job.id))).length >= 0, 'events');
  expect((await all(client.fineTuning.jobs.checkpoints.list(job.id))).length === 0, 'checkpoints');
});
await check('a job is paused, resumed and cancelled', async () => {
  await client.fineTuning.jobs.pause(job.id);
  await client.fineTuning.jobs.resume(job.id);
  expect((await client.fineTuning.jobs.cancel(job.id)).id === job.id, job);
});
await check('what does not exist is 404', async () => {
  await refused(client.files.retrieve('file-none'), 404);
  await refused(client.fineTuning.jobs.retrieve('ftjob-none'), 404);
  await refused(client.fineTuning.jobs.create({ model: 'none', training_file: file.id }), 404);
});
await check('a wrong parameter is 400', async () => {
  await refused(client.fineTuning.jobs.create({ model: 'tiny', training_file: file.id, suffix: 'a:b' }), 400);
});
await check('a file is deleted', async () => {
  expect((await client.files.delete(file.id)).deleted, file);
  await refused(client.files.content(file.id), 404);
});
