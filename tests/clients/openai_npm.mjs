// The package `openai`: chat, tools, schemas, completions and responses, whole and streamed.
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';
import { apiKey, baseURL, check, expect, model, refused } from './check.mjs';

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: 'user', content: 'Say hello.' }];
const ask = { model, messages, max_tokens: 40, temperature: 0 };
const Person = z.object({ name: z.string().max(10), age: z.number().int().min(0).max(150) });
const parameters = z.object({ city: z.string().max(10) });
const weather = zodFunction({ name: 'weather', description: 'd', parameters, function: ({ city }) => `clear in ${city}` });
const named = { type: 'function', function: { name: 'weather' } };
const flat = { type: 'function', name: 'weather', description: 'd', strict: true, parameters: z.toJSONSchema(parameters) };

await check('chat', async () => {
  const answer = await client.chat.completions.create(ask);
  expect(answer.usage.completion_tokens > 0 && answer.choices[0].message.role === 'assistant', answer);
});
await check('chat stream with usage', async () => {
  const stream = client.chat.completions.stream({ ...ask, stream_options: { include_usage: true } });
  const final = await stream.finalChatCompletion();
  expect(final.usage.total_tokens > 0 && typeof final.choices[0].message.content === 'string', final);
});
await check('chat parse with zod', async () => {
  const format = zodResponseFormat(Person, 'person');
  const answer = await client.chat.completions.parse({ ...ask, max_tokens: 120, response_format: format });
  expect(Person.safeParse(answer.choices[0].message.parsed).success, answer.choices[0]);
});
for (const stream of [false, true]) {
  await check(`chat runTools, stream ${stream}`, async () => {
    const run = client.chat.completions.runTools({ ...ask, max_tokens: 200, stream, tools: [weather], tool_choice: named });
    await run.done();
    expect(run.messages.at(-1).role === 'tool' && run.messages.at(-1).content.startsWith('clear in'), run.messages);
  });
}
await check('chat tool arguments arrive in pieces', async () => {
  const stream = await client.chat.completions.create({ ...ask, max_tokens: 200, stream: true, tools: [weather], tool_choice: named });
  let pieces = 0;
  for await (const chunk of stream) pieces += chunk.choices[0].delta.tool_calls?.some((call) => call.function.arguments) ?? 0;
  expect(pieces > 3, pieces);
});
await check('chat abort of a stream', async () => {
  const stream = await client.chat.completions.create({ ...ask, max_tokens: 500, stream: true });
  let chunks = 0;
  for await (const _ of stream) if (++chunks > 3) stream.controller.abort();
  expect(chunks >= 1, chunks);
});
await check('completions stream of two prompts and choices', async () => {
  const texts = {};
  const stream = await client.completions.create({ model, prompt: ['a', 'b'], n: 2, max_tokens: 3, stream: true });
  for await (const chunk of stream) for (const { index, text } of chunk.choices) texts[index] = (texts[index] ?? '') + text;
  expect(Object.keys(texts).length === 4, texts);
});
await check('models list and retrieve', async () => {
  const names = [];
  for await (const found of client.models.list()) names.push(found.id);
  expect(names.includes(model) && (await client.models.retrieve(model)).id === model, names);
});
await check('responses', async () => {
  const answer = await client.responses.create({ model, input: 'hi', instructions: 'Be brief.', max_output_tokens: 20 });
  expect(typeof answer.output_text === 'string' && answer.usage.output_tokens > 0 && answer.store === false, answer);
});
await check('responses stream helper with a tool', async () => {
  const stream = client.responses.stream({ model, input: 'hi', max_output_tokens: 200, tools: [flat], tool_choice: { type: 'function', name: 'weather' } });
  let pieces = 0;
  for await (const event of stream) pieces += event.type === 'response.function_call_arguments.delta';
  const [call] = (await stream.finalResponse()).output;
  expect(pieces > 3 && parameters.safeParse(JSON.parse(call.arguments)).success, { pieces, call });
});
await check('responses loop of a call and its output', async () => {
  const input = [{ role: 'user', content: 'Weather?' }];
  const first = await client.responses.create({ model, input, tools: [flat], tool_choice: 'required', parallel_tool_calls: false, max_output_tokens: 200 });
  const [call] = first.output;
  input.push(call, { type: 'function_call_output', call_id: call.call_id, output: 'clear' });
  const second = await client.responses.create({ model, input, tools: [flat], tool_choice: 'none', max_output_tokens: 10 });
  expect(second.output[0].type === 'message', second.output);
});
await check('responses parse with zod', async () => {
  const format = { format: zodTextFormat(Person, 'person') };
  const answer = await client.responses.parse({ model, input: 'Bob is 5', text: format, max_output_tokens: 120 });
  expect(Person.safeParse(answer.output_parsed).success, answer);
});
await check('embeddings are a 404', () => refused(client.embeddings.create({ model, input: 'hi' }), 404));
await check('an unknown model is a 404', () => refused(client.chat.completions.create({ ...ask, model: 'nope' }), 404));
await check('an unknown key is a 401', () => refused(new OpenAI({ baseURL, apiKey: 'x', maxRetries: 0 }).models.list(), 401));
