// Prints what the npm package apache-arrow finds in Arrow files, one JSON document for all of them.
//
//     node read.mjs [--codecs] FILE...
//
// Integers become numbers; floats and lists, bytes in hexadecimal. Without --codecs, compressed
// files fail as they do for anybody who registers no codec.

import { readFileSync } from "node:fs";
import { CompressionType, compressionRegistry, DataType, RecordBatchReader, Table } from "apache-arrow";

const files = process.argv.slice(2);
if (files[0] === "--codecs") {
  files.shift();
  const { default: lz4 } = await import("lz4js");
  const { decompress } = await import("fzstd");
  compressionRegistry.set(CompressionType.LZ4_FRAME, { decode: (data) => new Uint8Array(lz4.decompress(data)) });
  compressionRegistry.set(CompressionType.ZSTD, { decode: (data) => decompress(data).slice() });
}

const hex = (values) => Buffer.from(values.buffer, values.byteOffset, values.byteLength).toString("hex");

function cell(value, type) {
  if (value === null) return null;
  if (DataType.isInt(type)) return Number(value);
  if (DataType.isFloat(type)) return hex(Float32Array.of(value));
  return hex(value.toArray());
}

function read(file) {
  const reader = RecordBatchReader.from(readFileSync(file));
  const table = new Table([...reader]);
  const columns = {};
  for (const field of table.schema.fields) {
    columns[field.name] = Array.from(table.getChild(field.name), (value) => cell(value, field.type));
  }
  const { metadata } = table.schema.fields[0];
  return { isFile: reader.isFile(), rows: table.numRows, extension: metadata.get("ARROW:extension:name"), columns };
}

const found = {};
for (const file of files) {
  try {
    found[file] = read(file);
  } catch (error) {
    found[file] = { error: String(error) };
  }
}
process.stdout.write(JSON.stringify(found));
