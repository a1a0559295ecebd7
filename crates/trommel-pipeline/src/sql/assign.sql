-- nearest_cluster(embedding): the cluster of each window of one input file.
-- in:  embeddings(document, window, file, row, byte_start, byte_len, source, embedding)
-- out: document, window, file, row, byte_start, byte_len, cluster_id, distance, source
SELECT document, window, file, row, byte_start, byte_len, n['cluster_id'] AS cluster_id, n['distance'] AS distance, source
FROM (SELECT *, nearest_cluster(embedding) AS n FROM embeddings)
